"""What is held out: the share asked for, never all, and equal keys on one side."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.holdout import held_out_mask, key_hash


def hashes(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_equal_keys_are_on_one_side_and_neither_side_is_empty(values: list[int], fraction: float) -> None:
    mask = held_out_mask(hashes(*values), fraction)
    held_out = {value for value, out in zip(values, mask, strict=True) if out}
    trained = {value for value, out in zip(values, mask, strict=True) if not out}
    assert not held_out & trained
    assert trained, "something is left to train on"
    assert bool(held_out) == (len(set(values)) > 1)
    assert not held_out or max(held_out) < min(trained), "the smallest hashes"


@given(st.sets(st.integers(0, 2**64 - 1), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_the_share_of_different_keys(values: set[int], fraction: float) -> None:
    wanted = min(max(round(fraction * len(values)), 1), len(values) - 1)
    assert held_out_mask(hashes(*values), fraction).sum() == wanted


def test_nothing_is_held_out_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not held_out_mask(hashes(1, 2, 3), 0.0).any()
        assert caplog.text == ""
        assert not held_out_mask(hashes(5), 0.5).any()
        assert not held_out_mask(hashes(5, 5, 5), 0.5).any()
    assert caplog.text.count("set data.validation_path") == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [([1, 2], "1 of 2"), (range(9), "1 of 9"), (range(10), None), ([*range(50), *[0] * 9], "10 of 59")],
)
def test_far_more_than_asked_for_is_said(
    caplog: pytest.LogCaptureFixture, values: Sequence[int], said: str | None
) -> None:
    """Of two files, 5 % is one: half of the text would be missing from training silently."""
    with caplog.at_level(logging.WARNING):
        held_out_mask(hashes(*values), 0.05)
    assert [record.message.split(" documents")[0] for record in caplog.records] == ([said] if said else [])


def test_one_document_of_many_is_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    """As in the preset `debug`, which asks for half a document."""
    with caplog.at_level(logging.WARNING):
        assert held_out_mask(hashes(*range(470)), 0.001).sum() == 1
    assert caplog.records == []


def test_hashes_are_the_same_everywhere() -> None:
    assert key_hash("abc") == 0xBA7816BF8F01CFEA
    assert key_hash("file-\udcff") == key_hash("file-\udcff")
