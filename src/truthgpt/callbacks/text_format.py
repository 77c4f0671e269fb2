"""How numbers, durations and generated text are written for people."""

from __future__ import annotations

import math


def format_count(count: float) -> str:
    """A count in at most five characters: `950`, `12.3k`, `1.06M`, `7.24B`."""
    if not math.isfinite(count):
        return str(count)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Rounding up to the next unit (999,999 -> 1.00M) must not print as 1000k.
        if abs(count) >= limit * 0.9995:
            return f"{count / limit:.3g}{unit}" if abs(count) >= limit * 100 else f"{count / limit:#.3g}{unit}"
    return f"{count:.0f}"


def format_value(value: float) -> str:
    """A loss or metric with four decimals, or in scientific notation where those would say little."""
    size = abs(value)
    if 1e-3 <= size < 1e5 or size == 0:
        return f"{value:.4f}"
    return f"{value:.3e}"


def format_duration(seconds: float) -> str:
    """A duration as `0:05`, `12:34` or `1:02:03`; never negative."""
    total = max(0, round(seconds))
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def printable_lines(text: str, max_lines: int, max_width: int) -> list[str]:
    """Model output made safe to show: control characters (a terminal would obey them) as escapes, long output cut.

    Args:
        text: what a model wrote, any characters at all.
        max_lines: lines to keep; one more says how many were left out.
        max_width: characters of a line to keep.
    """
    lines = [_printable(line) for line in text.expandtabs(4).split("\n")]
    kept = [line if len(line) <= max_width else line[: max_width - 3] + "..." for line in lines[:max_lines]]
    if len(lines) > max_lines:
        kept.append(f"... ({len(lines) - max_lines} more lines)")
    return kept


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
