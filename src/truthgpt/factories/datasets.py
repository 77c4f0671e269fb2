"""DATASETS: where documents come from.

The parameters of a builder are the keys of `data.*` that its source reads, one by one or in a bundle; one that has no
default must be set. A source that can be read while training takes `streaming`, one that has images `images` and, for
the validation images, `classes`: those of the training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from truthgpt.factories.callbacks import package_installed
from truthgpt.factories.registry import Availability, Entry, NoOptions, Registry, accepts

if TYPE_CHECKING:
    from truthgpt.data.base import ImageFields, ImageSource, Source
    from truthgpt.data.rows import BadRowPolicy, RowFields

BUNDLES: dict[str, tuple[str, ...]] = {
    "rows": ("format", "text_field", "prompt_field", "completion_field", "messages_field", "train_on"),
    "bad_rows": ("on_bad_row", "max_bad_fraction"),
    "images": ("image_field", "label_field"),
}
"""Run-time arguments that stand for several keys: `RowFields`, `BadRowPolicy`, `ImageFields` (None for text)."""

KEYS: tuple[str, ...] = ("path", "dataset", "subset", "split", "streaming", *(k for b in BUNDLES.values() for k in b))
"""Keys of `data.*` that a source may read."""

LOCAL_FILES = frozenset({"text", "jsonl", "hf", "webdataset", "image_folder"})
"""Sources whose `data.path` is files and folders of this machine; what a plugin's is, it knows alone."""

DATASETS = Registry("data source", runtime=(*KEYS, *BUNDLES, "classes"))


def reads(entry: Entry, key: str) -> bool:
    """Whether the source reads `data.<key>`, alone or in a bundle."""
    bundle = next((name for name, keys in BUNDLES.items() if key in keys), key)
    return accepts(entry.build, key) or accepts(entry.build, bundle)


def _probe_hf() -> Availability:
    return _needs("datasets", "hf")


def _probe_webdataset() -> Availability:
    return _needs("webdataset", "webdataset")


def _probe_image_folder() -> Availability:
    return _needs("PIL", "vision")


def _needs(package: str, extra: str) -> Availability:
    if package_installed(package):
        return Availability(True)
    return Availability(False, f"{package} is not installed: pip install 'truthgpt[{extra}]'")


@DATASETS.register("text", options=NoOptions)
def build_text(path: list[str], streaming: bool) -> Source:
    """Plain UTF-8 text files, joined and cut into blocks."""
    from truthgpt.data.text_source import TextSource

    return TextSource(path)


@DATASETS.register("jsonl", options=NoOptions)
def build_jsonl(path: list[str], rows: RowFields, bad_rows: BadRowPolicy, streaming: bool) -> Source:
    """JSON Lines files, plain, .gz or .zst, one object a line: a text, a prompt and its completion, or a chat."""
    from truthgpt.data.jsonl_source import JsonlSource

    return JsonlSource(path, rows, bad_rows)


@DATASETS.register("hf", options=NoOptions, probe=_probe_hf)
def build_hf(
    rows: RowFields,
    bad_rows: BadRowPolicy,
    streaming: bool,
    images: ImageFields | None,
    classes: Sequence[str] | None = None,
    dataset: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    path: list[str] | None = None,
) -> Source | ImageSource:
    """The `datasets` library: hub names, saved folders, and parquet, csv, json or arrow files; rows or images."""
    from truthgpt.data.hf_source import HfImageSource, open_rows

    if images is not None:
        return HfImageSource(dataset, subset, split or "train", path, images, classes)
    return open_rows(dataset, subset, split or "train", path, rows, bad_rows, streaming)


@DATASETS.register("webdataset", options=NoOptions, probe=_probe_webdataset)
def build_webdataset(
    path: list[str],
    rows: RowFields,
    bad_rows: BadRowPolicy,
    streaming: bool,
    images: ImageFields | None,
    classes: Sequence[str] | None = None,
) -> Source | ImageSource:
    """Tar shards of samples: rows (.json, .txt) or images (.jpg, .png, .webp with .cls or .json)."""
    from truthgpt.data.webdataset_source import WebdatasetImageSource, WebdatasetSource

    if images is not None:
        return WebdatasetImageSource(path, images.label_field, classes)
    return WebdatasetSource(path, rows, bad_rows)


@DATASETS.register("image_folder", options=NoOptions, probe=_probe_image_folder)
def build_image_folder(
    path: list[str], images: ImageFields | None, classes: Sequence[str] | None = None
) -> ImageSource:
    """Images in a folder for each class."""
    from truthgpt.data.image_folder import ImageFolder

    return ImageFolder(path, classes)


@DATASETS.register("python_stdlib", options=NoOptions)
def build_python_stdlib() -> Source:
    """Source code of this Python's standard library: on every machine, no download."""
    from truthgpt.data.python_stdlib import PythonStdlib

    return PythonStdlib()
