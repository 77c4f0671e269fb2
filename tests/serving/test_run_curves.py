"""The curves of a run, as the page gets them."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.runtime.metrics_log import MetricsLog
from truthgpt.serving.run_curves import MOST_POINTS, Point, read_curves, thinned

values = st.one_of(st.none(), st.floats(-1e6, 1e6))


def test_rows_become_curves_by_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 5.0, "lr": 1e-3, "tokens_per_sec": 100.0, "grad_norm": 1.0})
    log.append({"step": 2, "loss": math.nan, "lr": 2e-3, "tokens_per_sec": math.inf})
    log.append({"step": 2, "val_loss": 4.0})
    log.append({"step": 2, "val_loss": 3.5})
    with log.path.open("a") as file:
        file.write('"no row"\n{"step": "3", "loss": 1.0}\n{"step": 4, "loss": 0.')
    assert read_curves(log.path) == {
        "loss": [(1, 5.0), (2, None)],
        "val_loss": [(2, 3.5)],
        "lr": [(1, 1e-3), (2, 2e-3)],
        "tokens_per_sec": [(1, 100.0), (2, None)],
    }


def test_a_run_that_has_logged_nothing_has_no_points(tmp_path: Path) -> None:
    assert not any(read_curves(tmp_path / "metrics.jsonl").values())


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=300), st.integers(5, 40))
def test_thinned_points_are_few_and_ordered_and_keep_ends_and_extremes(numbers: list[float | None], most: int) -> None:
    points: list[Point] = list(enumerate(numbers))
    kept = thinned(points, most)
    assert len(kept) <= max(most, 2)
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert any(value is None for _, value in kept) == any(value is None for value in numbers)
    finite = [value for value in numbers if value is not None]
    if finite:
        shown = [value for _, value in kept if value is not None]
        assert (min(shown), max(shown)) == (min(finite), max(finite))


def test_a_long_run_is_thinned_to_the_limit_and_a_spike_stays() -> None:
    points: list[Point] = [(step, 99.0 if step == 54_321 else step % 7 / 7) for step in range(100_000)]
    kept = thinned(points)
    assert MOST_POINTS // 2 < len(kept) <= MOST_POINTS
    assert (54_321, 99.0) in kept
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
