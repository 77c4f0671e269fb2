"""Fallbacks: one line each, kept for the run's record, an error when the configuration is strict."""

from __future__ import annotations

import logging

import pytest

from truthgpt.errors import ConfigError
from truthgpt.runtime.fallbacks import Fallbacks


def test_each_is_said_once_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    fallbacks = Fallbacks()
    with caplog.at_level(logging.WARNING, "truthgpt"):
        fallbacks.take("training.mixed_precision", "fp16", "none", "no GPU")
        fallbacks.take("data.num_workers", "9", "2", "two cores")
    assert [record.getMessage() for record in caplog.records] == [
        "training.mixed_precision: using none instead of fp16: no GPU",
        "data.num_workers: using 2 instead of 9: two cores",
    ]
    assert fallbacks.to_json()[0] == {
        "part": "training.mixed_precision",
        "wanted": "fp16",
        "used": "none",
        "reason": "no GPU",
    }
    assert len(fallbacks.to_json()) == 2


def test_strict_refuses_and_says_why() -> None:
    fallbacks = Fallbacks(strict=True)
    with pytest.raises(
        ConfigError, match=r"training\.mixed_precision: fp16 cannot be used: no GPU .*no fallback to none"
    ):
        fallbacks.take("training.mixed_precision", "fp16", "none", "no GPU")
    assert fallbacks.to_json() == []
