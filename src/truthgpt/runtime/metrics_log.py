"""`metrics.jsonl`: one JSON object a line. No torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from truthgpt.runtime.atomic_file import append_line, write_atomic

logger = logging.getLogger(__name__)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such numbers; they are written as these strings, as protocol buffers do. Python's `float` reads them."""
_TAIL_BYTES = 2**16


class MetricsLog:
    """Writes the metrics of a run, line by line.

    A failed write is said once and never ends the run: the row is lost, training is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row of plain values; NaN and infinities become the strings `NaN`, `Infinity`, `-Infinity`."""
        line = json.dumps({key: _to_json(value) for key, value in row.items()})
        try:
            append_line(self.path, line)
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be written, metrics are lost while that lasts: %s", self.path, error)
            self._failed = True

    def cut_after(self, step: int) -> None:
        """Keep the rows up to and including `step`, and drop a torn line: the run goes on from there.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = b"".join(line + b"\n" for line, row in _parsed(content) if _is_up_to(row, step))
        if kept != content:
            write_atomic(self.path, kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, non-finite numbers restored; a torn or foreign line is left out."""
    return [_from_json(row) for _, row in _parsed(path.read_bytes())]


def read_last(path: Path, key: str) -> Any:
    """The value of `key` in the last row that has it, or None; reads only the end of the file (64 KiB)."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        rows = [_from_json(row) for _, row in _parsed(file.read())]
    return next((row[key] for row in reversed(rows) if key in row), None)


def _parsed(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every line that is a JSON object, with its raw bytes; a torn one lacks its closing brace and is no JSON."""
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


def _is_up_to(row: Mapping[str, Any], step: int) -> bool:
    return isinstance(row.get("step"), int) and row["step"] <= step


def _to_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
