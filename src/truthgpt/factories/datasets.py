"""DATASETS: where documents come from.

The parameters of a builder are exactly the keys of `data.*` that its source reads; one that has no default must be set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from truthgpt.factories.registry import NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.data.base import Source

DATASETS = Registry(
    "data source",
    runtime=(
        "path",
        "dataset",
        "subset",
        "format",
        "text_field",
        "prompt_field",
        "completion_field",
        "train_on",
        "on_bad_row",
        "max_bad_fraction",
    ),
)


@DATASETS.register("text", options=NoOptions)
def build_text(path: list[str]) -> Source:
    """Plain UTF-8 text files, joined and cut into blocks."""
    from truthgpt.data.text_source import TextSource

    return TextSource(path)


@DATASETS.register("jsonl", options=NoOptions)
def build_jsonl(
    path: list[str],
    format: Literal["text", "prompt_completion"],
    text_field: str,
    prompt_field: str,
    completion_field: str,
    train_on: Literal["all", "completion"],
    on_bad_row: Literal["error", "skip"],
    max_bad_fraction: float,
) -> Source:
    """JSON Lines files, one object a line: a text, or a prompt and its completion."""
    from truthgpt.data.jsonl_source import BadRowPolicy, JsonlSource, RowFields

    fields = RowFields(format, text_field, prompt_field, completion_field, train_on)
    return JsonlSource(path, fields, BadRowPolicy(on_bad_row, max_bad_fraction))


@DATASETS.register("python_stdlib", options=NoOptions)
def build_python_stdlib() -> Source:
    """Source code of this Python's standard library: on every machine, no download."""
    from truthgpt.data.python_stdlib import PythonStdlib

    return PythonStdlib()
