from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from truthgpt.data.base import Document, Segment
from truthgpt.data.split import split_documents
from truthgpt.data.text_source import TextSource
from truthgpt.data.token_store import ABANDONED_AFTER_S, TokenStore, default_cache_dir, tokenize_documents
from truthgpt.errors import DataError, RunDirectoryError

from .conftest import ListSource, MakeStore, all_of, byte_tokenizer, rows

END = 256


def contents(store: TokenStore) -> tuple[list[int], list[int] | None, list[int]]:
    trained = None if store.trained is None else store.trained.tolist()
    return store.tokens.tolist(), trained, store.offsets.tolist()


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer()(text).input_ids
    return found


def test_documents_are_closed_by_end_of_text(make_store: MakeStore) -> None:
    store = make_store(rows("ab", "c"))
    assert contents(store) == ([*ids("ab"), END, *ids("c"), END], None, [0, 3, 5])
    assert (len(store), store.meta.dtype) == (5, "uint16")
    assert not (store.folder / "trained.bin").exists()


def test_prompts_are_marked_untrained(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c"), ("", "d")))
    assert contents(store) == (
        [*ids("ab"), *ids("c"), END, *ids("d"), END],
        [0, 0, 1, 1, 1, 1],
        [0, 4, 6],
    )


def test_begin_token_stands_before_each_document_and_belongs_to_its_first_segment(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(begin=True, close=True)
    store = tokenize_documents(all_of(rows(("a", "b"), "c")), tokenizer, 258, tmp_path)
    assert contents(store) == ([257, *ids("a"), *ids("b"), END, 257, *ids("c"), END], [0, 0, 1, 1, 1, 1, 1], [0, 4, 7])


def test_pieces_of_one_text_join_without_end_of_text(make_store: MakeStore) -> None:
    pieces = [Document(str(i), (Segment(text),), "here", continues=i > 0) for i, text in enumerate(["ab", "c", "d"])]
    assert contents(make_store(pieces)) == ([*ids("abcd"), END], None, [0, 5])


def test_a_file_with_held_out_pieces_keeps_every_token(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(1500))
    (tmp_path / "a.txt").write_text(text)
    split = split_documents(TextSource([str(tmp_path / "a.txt")]), 0.1)
    assert split.validation is not None
    stores = [tokenize_documents(part, byte_tokenizer(), 258, tmp_path) for part in (split.train, split.validation)]
    assert sum(int((store.tokens != END).sum()) for store in stores) == len(text)
    assert 1 < sum(store.meta.documents for store in stores) < 30
    assert stores[0].digest != stores[1].digest


def test_four_bytes_a_token_for_big_vocabularies(tmp_path: Path) -> None:
    for vocab_size, dtype in [(2**16, np.uint16), (2**16 + 1, np.uint32)]:
        store = tokenize_documents(all_of(rows("ab")), byte_tokenizer(), vocab_size, tmp_path)
        assert store.tokens.dtype == dtype
        assert store.tokens.tolist() == [*ids("ab"), END]


class CountedSource(ListSource):
    """Counts how often it is read."""

    reads = 0

    def documents(self) -> Iterator[Document]:
        self.reads += 1
        return super().documents()


def test_second_call_reads_the_cache_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = CountedSource(rows("ab", "c"))
    documents = split_documents(source, 0).train
    with caplog.at_level(logging.INFO):
        first = tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
        second = tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
    assert source.reads == 2  # the split and the first call
    assert first.folder == second.folder
    assert caplog.messages[0].startswith("tokenized 2 documents, 5 tokens, in ")
    assert caplog.messages[1].startswith("2 documents, 5 tokens, read from the cache")


def test_other_data_tokenizer_or_habit_is_another_store(tmp_path: Path) -> None:
    some, other = all_of(rows("he")), all_of(rows("she"))
    other_end = byte_tokenizer()
    other_end.eos_token = "!"
    cases = [
        (some, byte_tokenizer()),
        (some, other_end),
        (other, byte_tokenizer()),
        (some, byte_tokenizer(merges=("he",))),
        (some, byte_tokenizer(begin=True)),
    ]
    digests = [tokenize_documents(documents, tokenizer, 300, tmp_path).digest for documents, tokenizer in cases]
    assert len(set(digests)) == 5
    padded = byte_tokenizer()
    padded.pad_token = padded.eos_token
    padded(["a", "bc"], padding=True)
    assert tokenize_documents(some, padded, 300, tmp_path).digest == digests[0]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "trained.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damaged_store_is_made_again(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    documents = all_of(rows(("ab", "c")))
    store = tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
    expected, path = contents(store), store.folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"")
    with pytest.raises(DataError, match="token store"):
        TokenStore(store.folder)
    assert contents(tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)) == expected
    assert "it is made again" in caplog.text


class EndlessSource(ListSource):
    """After the split has read it, goes on until the process is killed."""

    reads = 0

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        self.reads += 1
        while self.reads > 1:
            time.sleep(0.01)


def _write_for_ever(cache: Path) -> None:
    documents = split_documents(EndlessSource(rows(*["text " * 1000] * 200)), 0).train
    tokenize_documents(documents, byte_tokenizer(), 258, cache)


def test_killed_writer_leaves_no_store_and_its_leftovers_go(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tokens/.*.tmp-*/tokens.bin")):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    (leftover,) = (tmp_path / "tokens").iterdir()
    documents = all_of(rows(*["text " * 1000] * 200))
    store = tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
    assert len(store) == 200 * 5001
    assert leftover.exists()  # it might be another process's that still writes
    old = time.time() - ABANDONED_AFTER_S - 10
    for path in [*leftover.iterdir(), leftover]:
        os.utime(path, (old, old))
    tokenize_documents(all_of(rows("other")), byte_tokenizer(), 258, tmp_path)
    assert not leftover.exists()


class FailingSource(ListSource):
    """Fails when it is read again after the split."""

    failing = False

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        if self.failing:
            raise DataError("broken row")


def test_failed_writer_cleans_up(tmp_path: Path) -> None:
    source = FailingSource(rows("ab"))
    documents = split_documents(source, 0).train
    source.failing = True
    with pytest.raises(DataError, match="broken row"):
        tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


class RacingSource(ListSource):
    """While it is read for the store, somebody else makes the same store."""

    rival: Path | None = None

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        if self.rival is not None:
            tokenize_documents(all_of(self.items), byte_tokenizer(), 258, self.rival)


def test_faster_rival_wins(tmp_path: Path) -> None:
    source = RacingSource(rows("ab"))
    documents = split_documents(source, 0).train
    source.rival = tmp_path
    store = tokenize_documents(documents, byte_tokenizer(), 258, tmp_path)
    assert store.tokens.tolist() == [*ids("ab"), END]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [store.folder.name]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"token cache .*TRUTHGPT_CACHE_DIR"):
        tokenize_documents(all_of(rows("ab")), byte_tokenizer(), 258, tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "tokens").symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError, match="token cache"):
        tokenize_documents(all_of(rows("ab")), byte_tokenizer(), 258, tmp_path)


def test_cached_tokens_are_checked_against_a_smaller_model(tmp_path: Path) -> None:
    documents = all_of(rows("he"))
    tokenizer = byte_tokenizer(merges=("he",))
    tokenizer.eos_token = "a"
    tokenize_documents(documents, tokenizer, 257, tmp_path)
    with pytest.raises(DataError, match="token id 256, the model has ids 0 to 255"):
        tokenize_documents(documents, tokenizer, 256, tmp_path)


def test_pickles_small_and_without_the_data(make_store: MakeStore) -> None:
    store = make_store(rows(("a", "text " * 10_000)))
    expected = contents(store)
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert contents(pickle.loads(data)) == expected  # noqa: S301 - our own object, as a loader process gets it


def test_meta_is_plain_json(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c")))
    assert json.loads((store.folder / "meta.json").read_text()) == {
        "digest": store.digest,
        "dtype": "uint16",
        "documents": 1,
        "tokens": 4,
        "trained_tokens": 2,
        "largest_token_id": END,
    }


def test_cache_dir_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRUTHGPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == Path("/home/somebody/.cache/truthgpt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert default_cache_dir() == Path("/var/caches/truthgpt")
    monkeypatch.setenv("TRUTHGPT_CACHE_DIR", "~/own")
    assert default_cache_dir() == Path("/home/somebody/own")
