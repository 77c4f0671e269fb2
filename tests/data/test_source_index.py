from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from truthgpt.data import source_index
from truthgpt.data.base import Conversation, Document, Segment
from truthgpt.data.source_index import SourceIndex, index_source
from truthgpt.data.split import split_documents
from truthgpt.data.text_source import TextSource
from truthgpt.data.token_store import tokenize_documents
from truthgpt.errors import DataError

from .conftest import ListSource, byte_encoder, rows


class FileSource:
    """One document a line of a file; counts how often it is read, and tells its identity as file sources do."""

    layout = "rows"

    def __init__(self, path: Path, wait_for: Path | None = None) -> None:
        self.path = path
        self.wait_for = wait_for
        self.reads = 0
        self.identified = True

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            yield Document(line, (Segment(line),), f"{self.path}:{number}")
        while self.wait_for is not None and not self.wait_for.exists():
            time.sleep(0.01)

    def identity(self) -> str | None:
        status = self.path.stat()
        return (
            json.dumps([[str(self.path), status.st_size, status.st_mtime_ns], "setting"]) if self.identified else None
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Ten lines, written a minute ago."""
    found = tmp_path / "lines.txt"
    found.write_text("".join(f"line {index}\n" for index in range(10)))
    age(found, 60)
    return found


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written just now stays so, however long the test takes."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def same(one: SourceIndex, other: SourceIndex) -> bool:
    return one.digest == other.digest and one.hashes.tolist() == other.hashes.tolist()


def test_second_start_reads_nothing(path: Path, tmp_path: Path) -> None:
    first = index_source(FileSource(path), tmp_path)
    source = FileSource(path)
    second = index_source(source, tmp_path)
    assert source.reads == 0 and same(first, second)
    assert isinstance(second.hashes, np.memmap) and len(second.hashes) == 10
    assert same(first, index_source(source)) and source.reads == 1  # without a cache
    assert not list(tmp_path.glob("index/.*"))


def test_warm_index_and_store_read_no_document(path: Path, tmp_path: Path) -> None:
    sources = [FileSource(path), FileSource(path)]
    digests = []
    for source in sources:
        split = split_documents(source, 0.2, cache_dir=tmp_path)
        assert split.validation is not None
        sets = (split.train, split.validation)
        digests.append([split.digest, *(tokenize_documents(part, byte_encoder(), tmp_path).digest for part in sets)])
    assert [source.reads for source in sources] == [3, 0]
    assert digests[0] == digests[1]


def test_touched_file_is_read_but_not_tokenized_again(path: Path, tmp_path: Path) -> None:
    stores = []
    for seconds, reads in [(60, 2), (50, 1)]:
        age(path, seconds)
        source = FileSource(path)
        stores.append(
            tokenize_documents(split_documents(source, 0, cache_dir=tmp_path).train, byte_encoder(), tmp_path)
        )
        assert source.reads == reads
    assert stores[0].folder == stores[1].folder


def test_changed_content_is_another_index(path: Path, tmp_path: Path) -> None:
    first = index_source(FileSource(path), tmp_path)
    path.write_text(path.read_text().replace("7", "8"))
    age(path, 60.5)
    assert not same(first, index_source(FileSource(path), tmp_path))


@pytest.mark.parametrize(("seconds", "kept"), [(-3600, False), (0, False), (1, False), (4, True)])
def test_file_that_changed_just_now_is_not_trusted(
    path: Path, tmp_path: Path, seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch)
    age(path, seconds)
    index_source(FileSource(path), tmp_path)
    source = FileSource(path)
    index_source(source, tmp_path)
    assert source.reads == (0 if kept else 1)


@pytest.mark.parametrize(("seconds", "kept"), [(0, 0), (60, 1)])
def test_times_are_found_in_the_identity_of_a_real_source(
    path: Path, tmp_path: Path, seconds: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch)
    age(path, seconds)
    index_source(TextSource([str(path)]), tmp_path / "cache")
    assert len(list(tmp_path.glob("cache/index/*"))) == kept


class GrowingSource(FileSource):
    """The file gets another line while it is read."""

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        self.path.write_text(self.path.read_text() + "more\n")
        age(self.path, 60)


def test_file_that_changes_while_it_is_read_is_not_kept(path: Path, tmp_path: Path) -> None:
    index_source(GrowingSource(path), tmp_path)
    assert list((tmp_path / "index").iterdir()) == []


def test_source_without_identity_is_read_every_time(path: Path, tmp_path: Path) -> None:
    source = FileSource(path)
    source.identified = False
    first, second = index_source(source, tmp_path), index_source(source, tmp_path)
    assert source.reads == 2 and same(first, second) and first.identity is None
    assert same(first, index_source(ListSource(list(source.documents())), tmp_path))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("name", ["hashes.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damaged_index_is_made_again(path: Path, tmp_path: Path, name: str, damage: str) -> None:
    first = index_source(FileSource(path), tmp_path)
    (file,) = tmp_path.glob(f"index/*/{name}")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else b"")
    sources = [FileSource(path), FileSource(path)]
    assert all(same(first, index_source(source, tmp_path)) for source in sources)
    assert [source.reads for source in sources] == [1, 0]


def test_cache_that_cannot_be_written_costs_only_time(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index").write_text("a file")
    source = FileSource(path)
    assert same(index_source(source, tmp_path), index_source(FileSource(path)))
    assert source.reads == 1
    assert "the documents are read at every start" in caplog.text


def test_disk_that_is_full_costs_only_time(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("truthgpt.data.source_index.write_synced", full)
    source = FileSource(path)
    assert len(index_source(source, tmp_path).hashes) == 10
    assert source.reads == 1
    assert "No space left on device; free some space" in caplog.text
    assert list((tmp_path / "index").iterdir()) == []


def _index(path: Path, cache: Path, go: Path, result: Path) -> None:
    logging.basicConfig(filename=result, level=logging.INFO, format="%(message)s", force=True)
    source = FileSource(path, wait_for=go)
    index_source(source, cache)
    logging.getLogger("truthgpt").info("reads: %d", source.reads)


def _await_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_and_a_kill_half_way(path: Path, tmp_path: Path, killed: bool) -> None:
    context = multiprocessing.get_context("fork")
    cache, go, result = tmp_path / "cache", tmp_path / "go", tmp_path / "second"
    first = context.Process(target=_index, args=(path, cache, go, tmp_path / "first"), daemon=True)
    first.start()
    deadline = time.monotonic() + 60
    while not list(cache.glob("index/.*.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = context.Process(target=_index, args=(path, cache, go, result), daemon=True)
    second.start()
    _await_text(result, "another process is reading the same documents; waiting for it")
    if killed:
        first.kill()
        first.join()
    go.touch()
    first.join()
    second.join()
    assert f"reads: {int(killed)}" in result.read_text()
    assert [file.name.startswith(".") for file in (cache / "index").iterdir()] == [False]


def test_no_document(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 usable documents"):
        index_source(ListSource([]), tmp_path)


def chat(**changes: object) -> list[Document]:
    values = {"messages": ({"role": "user", "content": "hi"},), "tools": ({"name": "f"},), "trained": "all", **changes}
    return [Document("k", (Segment("hi"),), "here", conversation=Conversation(**values))]  # type: ignore[arg-type]


def test_conversations_are_part_of_the_digest() -> None:
    variants = [
        [Document("k", (Segment("hi"),), "here")],
        chat(),
        chat(messages=({"role": "system", "content": "hi"},)),
        chat(messages=({"role": "user", "content": "hi", "name": "x"},)),
        chat(tools=()),
        chat(trained="assistant"),
        chat(context=(0,)),
        chat(context=(0,), trained="assistant"),
    ]
    digests = [index_source(ListSource(documents)).digest for documents in variants]
    assert len(set(digests)) == len(digests)
    assert index_source(ListSource(chat())).digest == digests[1]


def test_a_conversation_without_context_has_the_digest_it_always_had(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    add_text = source_index._add_text
    monkeypatch.setattr(source_index, "_add_text", lambda digest, text: (hashed.append(text), add_text(digest, text)))
    index_source(ListSource(chat()))
    assert hashed == ["k", "hi", '[[{"role": "user", "content": "hi"}], [{"name": "f"}], "all"]']


def test_an_index_from_before_weights_were_read_is_not_used(path: Path, tmp_path: Path) -> None:
    """It may count chats of which nothing is trained, and hash none of the weights."""
    source = FileSource(path)
    old = hashlib.sha256(f"1\n{source.identity()}".encode()).hexdigest()[:32]
    (tmp_path / "index").mkdir()
    stale = SourceIndex(np.zeros(3, dtype=np.uint64), "stale", source.identity())
    source_index._write(tmp_path / "index" / old, stale)
    found = index_source(source, tmp_path)
    assert (len(found.hashes), source.reads) == (10, 1)


def test_long_texts_are_hashed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aé\U0001f600b" * 5
    changed = [text[:i] + "z" + text[i + 1 :] for i in range(len(text))]
    expected = [index_source(ListSource(rows(each))).digest for each in (text, *changed)]
    monkeypatch.setattr("truthgpt.data.source_index._ENCODE_CHARACTERS", 3)
    found = [index_source(ListSource(rows(each))).digest for each in (text, *changed)]
    assert found == expected and len(set(found)) == len(found)
