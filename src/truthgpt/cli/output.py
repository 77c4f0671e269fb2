"""What the commands print, and how they read their arguments: JSON alone on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import typer

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def for_terminal(text: str) -> str:
    """What a model wrote, for stdout: a terminal is not sent the characters that it would obey; a file or a pipe gets
    the text as it is."""
    return text.translate(_CONTROL) if sys.stdout.isatty() else text


def emit_json(document: Any) -> None:
    """Print `document` as the one JSON document on stdout; NaN and infinity, which JSON lacks, become null."""
    typer.echo(json.dumps(_standard(document), indent=2, allow_nan=False))


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    typer.echo(text, err=True)


def standard_input() -> TextIO:
    """Standard input as files are read: in UTF-8 whatever the locale is, and without a mark of the byte order.

    Reading from it raises UnicodeDecodeError: Python's own, in the locale C, lets bytes pass that are no text.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    return sys.stdin


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns on stdout."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def precision_label(precision: str) -> str:
    """How a precision is called in what people read: `none`, no lower one than float32, is `fp32`."""
    return "fp32" if precision == "none" else precision


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The CONFIG (the first argument without `=`, None when there is none) and the overrides (all others)."""
    for index, argument in enumerate(arguments):
        if "=" not in argument:
            return argument, [*arguments[:index], *arguments[index + 1 :]]
    return None, list(arguments)


def _standard(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
