"""The SCHEDULERS registry: names, options, and plug-ins."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from truthgpt.factories.scheduler import SCHEDULERS
from truthgpt.optim import schedules


def test_names() -> None:
    assert {"constant", "cosine", "linear", "wsd"} <= set(SCHEDULERS.names())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cosine", {}, schedules.cosine(100, 6, 0.0)),
        ("cosine", {"min_ratio": 0.1}, schedules.cosine(100, 6, 0.1)),
        ("linear", {}, schedules.linear(100, 6, 0.0)),
        ("linear", {"min_ratio": 1}, schedules.linear(100, 6, 1.0)),
        ("constant", {}, schedules.constant(100, 6)),
        ("wsd", {}, schedules.wsd(100, 6, 0.2, 0.0)),
        ("wsd", {"decay_ratio": 0.5, "min_ratio": 0.1}, schedules.wsd(100, 6, 0.5, 0.1)),
    ],
)
def test_builds(name: str, options: dict[str, Any], expected: schedules.Schedule) -> None:
    assert SCHEDULERS.build(name, options, total_steps=100, warmup_steps=6) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {"min_ratio": 1.5}),
        ("cosine", {"min_ratio": -0.1}),
        ("linear", {"min_ratio": "0.1"}),
        ("linear", {"decay_ratio": 0.2}),
        ("constant", {"min_ratio": 0.1}),
        ("wsd", {"decay_ratio": float("nan")}),
        ("wsd", {"decay_ratio": 1.1}),
    ],
)
def test_refuses_wrong_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SCHEDULERS.build(name, options, total_steps=100, warmup_steps=6)
