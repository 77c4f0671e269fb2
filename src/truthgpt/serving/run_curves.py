"""The curves of a run, thinned out for a page. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from truthgpt.runtime.metrics_log import read_rows

CURVES = ("loss", "val_loss", "lr", "tokens_per_sec")
MOST_POINTS = 1000
_KEPT_A_BUCKET = 3
"""The lowest, the highest, and the first that is not finite."""

Point = tuple[int, float | None]
"""A step and the value there; None: NaN or infinite."""


def read_curves(metrics: Path) -> dict[str, list[Point]]:
    """The points of each curve in a metrics file, by step, at most 1,000 a curve; no file: no points.

    Args:
        metrics: `metrics.jsonl`; a torn line is passed over. Of several rows of one step the last counts.
    """
    curves: dict[str, dict[int, float | None]] = {name: {} for name in CURVES}
    for row in read_rows(metrics) if metrics.is_file() else []:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for name in CURVES:
            value = row.get(name)
            if _is_number(value):
                curves[name][step] = value if math.isfinite(value) else None
    return {name: thinned(sorted(points.items())) for name, points in curves.items()}


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points, so that the line looks the same: extremes, gaps and both ends stay.

    Args:
        points: ordered by step.
        most: 5 or more.
    """
    if len(points) <= most:
        return list(points)
    buckets = (most - 2) // _KEPT_A_BUCKET
    inner = points[1:-1]
    kept = [points[0]]
    for bucket in range(buckets):
        part = inner[bucket * len(inner) // buckets : (bucket + 1) * len(inner) // buckets]
        finite = [point for point in part if point[1] is not None]
        chosen = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        chosen |= set([point for point in part if point[1] is None][:1])
        kept += sorted(chosen, key=lambda point: point[0])
    return [*kept, points[-1]]


def _value(point: Point) -> float:
    return math.nan if point[1] is None else point[1]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
