"""metrics.jsonl: standard JSON, torn lines, cutting back, disks that fail."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.runtime.metrics_log import MetricsLog, read_last, read_rows

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8).filter(lambda t: "N" not in t and "I" not in t),
)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=5)


def same(one: Any, other: Any) -> bool:
    return one == other or (
        isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    )


@given(ROWS)
def test_every_row_comes_back_and_is_standard_json(rows: list[dict[str, Any]]) -> None:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        for row in rows:
            log.append(row)
        back = read_rows(log.path) if rows else []
        lines = log.path.read_text().splitlines() if rows else []
    assert len(back) == len(rows)
    assert all(same(new[key], old[key]) for new, old in zip(back, rows, strict=True) for key in old)
    for line in lines:
        json.loads(line, parse_constant=refuse)


def test_non_finite_numbers_are_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.append({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    assert log.path.read_text() == '{"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5}\n'


def written(path: Path, steps: int, tail: str = "") -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": 1.0 / step})
    with path.open("a") as file:
        file.write(tail)
    return log


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', "{", "\0\0\0", '{"step": 9}'])
def test_cutting_back_keeps_the_steps_done_and_drops_a_torn_line(tmp_path: Path, tail: str) -> None:
    log = written(tmp_path / "m", 5, tail)
    first = log.path.read_text().splitlines()[:3]
    log.cut_after(3)
    assert log.path.read_text().splitlines() == first
    log.append({"step": 4})
    assert [row["step"] for row in read_rows(log.path)] == [1, 2, 3, 4]


def test_cutting_at_the_last_step_still_drops_the_torn_line(tmp_path: Path) -> None:
    log = written(tmp_path / "m", 2, '{"st')
    log.cut_after(2)
    assert log.path.read_bytes().endswith(b"}\n")
    assert len(read_rows(log.path)) == 2


def test_cutting_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m").cut_after(3)
    assert not (tmp_path / "m").exists()


def test_a_reader_passes_over_torn_lines(tmp_path: Path) -> None:
    written(tmp_path / "m", 2, "[1]\nnonsense\n" + '{"step": 3}\n{"st')
    assert [row["step"] for row in read_rows(tmp_path / "m")] == [1, 2, 3]


def test_the_last_value_is_found_in_the_tail(tmp_path: Path) -> None:
    log = written(tmp_path / "m", 3000)
    log.append({"step": 3001, "val_loss": math.nan})
    assert (tmp_path / "m").stat().st_size > 2**16
    assert read_last(log.path, "loss") == 1.0 / 3000
    assert math.isnan(read_last(log.path, "val_loss"))
    assert read_last(log.path, "no") is None
    assert read_last(tmp_path / "nowhere", "loss") is None


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "folder").write_text("a file where the folder should be")
    log = MetricsLog(tmp_path / "folder" / "m")
    with caplog.at_level(logging.WARNING):
        log.append({"step": 1})
        log.append({"step": 2})
    assert len(caplog.records) == 1
    (tmp_path / "folder").unlink()
    log.append({"step": 3})
    assert read_rows(log.path) == [{"step": 3}]
