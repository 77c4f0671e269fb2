"""How the `datasets` library is told to read only the columns that are used, and those of CSV as they are written."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truthgpt.data.compressed_file import ArchiveError, open_binary

PARQUET_BATCH_ROWS = 1000
"""Rows taken out of a parquet file at a time. By itself the library takes as many as the first group of rows has,
however many these are; where they are none it refuses the file."""


def column_options(kind: str, columns: Sequence[str], files: Sequence[Path], sep: str = ",") -> dict[str, Any]:
    """Settings of the library's builder `kind` that read `columns` of `files`; a column may be missing.

    Of CSV a cell is the text that stands in it, be it `None`, `NA` or `007`, and nothing only where it is empty: by
    itself the library takes some words for nothing, and a column of numbers for numbers. Of parquet, columns that are
    not read need not agree between the files.

    Args:
        sep: what stands between the cells of CSV.

    Raises:
        OSError, pyarrow.ArrowException: a parquet file that cannot be read.
    """
    if kind == "csv":
        # Every column is text: a number here and `NA` 10,000 rows on would end the run, though nobody reads either.
        every = dict.fromkeys([*columns, *_headers(files, sep)], str)
        return {"converters": every, "keep_default_na": False, "na_values": [""]}
    if kind == "parquet":
        return {"columns": there} if (there := _in_all(columns, files)) else {}
    return {}


def _headers(files: Sequence[Path], sep: str) -> list[str]:
    """Columns of all the files; none of one that cannot be read, of which what is wrong is said when its rows are."""
    found: dict[str, None] = {}
    for file in files:
        with contextlib.suppress(OSError, ValueError, ArchiveError, csv.Error), open_binary(file) as content:
            rows = csv.reader(io.TextIOWrapper(content, "utf-8-sig", newline=""), delimiter=sep)
            found |= dict.fromkeys(next(filter(None, rows), ()))  # blank lines may stand in front
    return list(found)


def _in_all(columns: Sequence[str], files: Sequence[Path]) -> list[str] | None:
    """Those of `columns` that a file has; None where one is in some files only, which the library fills with nulls."""
    import pyarrow.parquet

    found = [set(columns).intersection(pyarrow.parquet.read_schema(file).names) for file in files]
    same = all(names == found[0] for names in found)
    return [column for column in columns if column in found[0]] if same else None
