"""The guard: which steps it skips, how it counts them, and when it ends the run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.errors import NonFiniteError
from truthgpt.trainers.guards import NonFiniteGuard

CPU = torch.device("cpu")


def judge(guard: NonFiniteGuard, loss: float, norm: float = 1.0) -> float:
    return float(guard.judge(torch.tensor(loss), torch.tensor(norm)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_any_non_finite_value_is_skipped(bad: float) -> None:
    guard = NonFiniteGuard(10, CPU)
    assert (judge(guard, 1.0), judge(guard, bad), judge(guard, 1.0, bad)) == (0.0, 1.0, 1.0)
    assert guard.skipped() == 2


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_counts_like_a_plain_loop(bad_steps: list[bool], limit: int) -> None:
    guard = NonFiniteGuard(limit, CPU)
    in_a_row = longest = 0
    for bad in bad_steps:
        judge(guard, math.nan if bad else 1.0)
        in_a_row = in_a_row + 1 if bad else 0
        longest = max(longest, in_a_row)
    assert guard.skipped() == sum(bad_steps)
    if longest > limit:
        with pytest.raises(NonFiniteError, match=f"more than {limit} steps"):
            guard.check()
    else:
        guard.check()


def test_a_streak_goes_on_after_a_resume() -> None:
    guard = NonFiniteGuard(3, CPU)
    for _ in range(3):
        judge(guard, math.nan)
    resumed = NonFiniteGuard(3, CPU)
    resumed.load_state_dict(guard.state_dict())
    resumed.check()
    judge(resumed, math.nan)
    assert resumed.skipped() == 4
    with pytest.raises(NonFiniteError):
        resumed.check()


def test_an_old_streak_is_forgotten_after_a_resume() -> None:
    """`check` looked at it when it was saved; only the present one counts."""
    guard = NonFiniteGuard(3, CPU)
    for value in (math.nan, math.nan, 1.0):
        judge(guard, value)
    assert guard.state_dict() == {"in_a_row": 0, "total": 2}
