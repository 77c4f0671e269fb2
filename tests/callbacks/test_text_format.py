"""Numbers, durations and model output for people."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.callbacks.text_format import format_count, format_duration, format_value, printable_lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950, "950"),
        (1000, "1.00k"),
        (12345.6, "12.3k"),
        (123456, "123k"),
        (999_999, "1.00M"),
        (1_064_320, "1.06M"),
        (7.24e9, "7.24B"),
        (1.5e12, "1.50T"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@given(st.floats(min_value=0, max_value=9.9e14))
def test_counts_are_short(count: float) -> None:
    assert len(format_count(count)) <= 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.89, "1.8900"), (0.0, "0.0000"), (1e-4, "1.000e-04"), (123456.0, "1.235e+05"), (math.nan, "nan")],
)
def test_format_value(value: float, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0:00"), (0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.text(max_size=200))
def test_nothing_a_terminal_obeys_is_left(text: str) -> None:
    lines = printable_lines(text, max_lines=5, max_width=30)
    assert len(lines) <= 6
    assert all(line.isprintable() and len(line) <= 30 for line in lines[:5])


def test_long_output_is_cut_and_says_so() -> None:
    assert printable_lines("\x1b[2J\n" + "x" * 50 + "\na\nb\n\tc", 3, 20) == [
        r"\x1b[2J",
        "x" * 17 + "...",
        "a",
        "... (2 more lines)",
    ]
