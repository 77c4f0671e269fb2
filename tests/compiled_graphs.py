"""How many graphs a run compiles for its own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import truthgpt.build
from truthgpt.build_memory import PlannedMemory


def count_graphs_after_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `counters` begin when memory is planned: the plan compiles for tensors without storage."""
    plan_memory = truthgpt.build.plan_memory

    def plan_first(*arguments: Any) -> PlannedMemory:
        planned = plan_memory(*arguments)
        counters.clear()
        return planned

    monkeypatch.setattr(truthgpt.build, "plan_memory", plan_first)
    torch._dynamo.reset()
    counters.clear()
