"""Schedules against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.optim.schedules import Schedule, constant, cosine, linear, wsd

STEPS = st.integers(1, 200)
RATIO = st.floats(0.0, 1.0)


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (linear(6, 2, 0.0), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (linear(5, 0, 0.5), [1.0, 0.9, 0.8, 0.7, 0.6]),
        (cosine(8, 4, 0.0), [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
        (cosine(3, 0, 0.1), [1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25]),
        (constant(4, 2), [0.5, 1.0, 1.0, 1.0]),
        (wsd(10, 2, 0.4, 0.0), [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (wsd(10, 0, 0.2, 0.5), [1.0] * 9 + [0.75]),
        (wsd(4, 0, 0.0, 0.0), [1.0, 1.0, 1.0, 1.0]),
        (wsd(4, 2, 1.0, 0.0), [0.5, 1.0, 1.0, 0.5]),
        (cosine(3, 3, 0.0), [1 / 3, 2 / 3, 1.0]),
        (linear(2, 4, 0.0), [0.25, 0.5]),
        (constant(1, 1), [1.0]),
        (wsd(3, 5, 0.5, 0.0), [0.2, 0.4, 0.6]),
    ],
)
def test_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert factors(schedule) == pytest.approx(expected, abs=1e-12)


BUILDERS: list[Callable[[int, int, float], Schedule]] = [
    cosine,
    linear,
    lambda total, warmup, _: constant(total, warmup),
    lambda total, warmup, ratio: wsd(total, warmup, 0.3, ratio),
]


@given(builder=st.sampled_from(BUILDERS), total=STEPS, warmup=st.integers(0, 250), min_ratio=RATIO)
def test_shape_of_every_schedule(
    builder: Callable[[int, int, float], Schedule], total: int, warmup: int, min_ratio: float
) -> None:
    schedule = builder(total, warmup, min_ratio)
    values = factors(schedule)
    assert all(0.0 < value <= 1.0 for value in values), "no step is wasted"
    rising, falling = values[: min(warmup, total)], values[min(warmup, total) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 1.0, "the peak is reached"
        assert min(falling) >= min_ratio - 1e-12
    if 0 < warmup <= total:
        assert values[0] == pytest.approx(1 / warmup)
        assert values[warmup - 1] == 1.0
    assert 0.0 <= schedule.factor(total + warmup + 1) <= 1.0, "a step past the end is harmless"


def test_the_end_is_min_ratio() -> None:
    for schedule in (cosine(100, 10, 0.1), linear(100, 10, 0.1), wsd(100, 10, 0.2, 0.1)):
        assert schedule.factor(99) > 0.1
        assert schedule.factor(100) == pytest.approx(0.1)
        assert schedule.factor(10**6) == pytest.approx(0.1)


def test_is_a_function_and_says_what_it_is() -> None:
    schedule = cosine(10, 2, 0.0)
    assert [schedule(step) for step in range(10)] == factors(schedule)
    assert schedule.state_dict() == {"kind": "cosine", "total_steps": 10, "warmup_steps": 2}
    kinds = [constant(10, 2), linear(10, 2, 0.0), wsd(10, 2, 0.2, 0.0)]
    assert [other.state_dict()["kind"] for other in kinds] == ["constant", "linear", "wsd"]
