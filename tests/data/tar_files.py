"""Tar shards written by the tests, and what is read from them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest

from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.data.webdataset_source import WebdatasetSource
from truthgpt.errors import DataError

TarWriter = pytest.importorskip("webdataset").TarWriter

BLOCK = 512
Format = Literal["text", "prompt_completion", "chat"]
MEMBERS = [("a.txt", b"a" * 600), ("b.txt", b"b"), ("c.txt", b"c" * 512)]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_samples(path: Path, samples: Iterable[dict[str, object]]) -> Path:
    """A shard as the library writes it: with a float time, so that every member has a pax header."""
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def text_source(
    *paths: Path | str,
    format: Format = "text",
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_fraction: float = 0.5,
) -> WebdatasetSource:
    fields = RowFields(format, "text", "prompt", "completion", "messages", "all")
    return WebdatasetSource([str(path) for path in paths], fields, BadRowPolicy(on_bad_row, max_bad_fraction))


def texts(*paths: Path | str) -> list[str]:
    return [document.text for document in text_source(*paths).documents()]


def error_of(*paths: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        texts(*paths)
    return str(caught.value)


def tar_end(path: Path) -> int:
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
        return last.offset_data + -(-last.size // BLOCK) * BLOCK


def with_checksums(data: bytes) -> bytes:
    """Tar headers whose content was changed, with new checksums."""
    blocks = [bytearray(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = f"{sum(block):06o}\0 ".encode()
    return b"".join(blocks)
