"""`truthgpt serve` with an engine that has no model, as a plugin; its folder's name is the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.serving.fake_engine import FakeEngine

from truthgpt.cli import serve
from truthgpt.errors import CheckpointError


def _engine(target: Path, device: str) -> tuple[FakeEngine, Any]:
    from truthgpt.models.tokenizer import byte_tokenizer

    if target.name == "absent":
        raise CheckpointError(f"nothing to load at {target}")
    return FakeEngine(target.name, step_s=0.01, context_tokens=None), byte_tokenizer()


serve._engine = _engine
