from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from truthgpt.data import parallel_encoding, token_store
from truthgpt.data.base import Document, Segment
from truthgpt.data.split import split_documents
from truthgpt.data.text_source import TextSource
from truthgpt.data.token_store import TokenStore, default_cache_dir, tokenize_documents
from truthgpt.data.tokenization import DocumentEncoder, TokenRun
from truthgpt.errors import DataError, RunDirectoryError

from .conftest import ListSource, MakeStore, all_of, byte_encoder, byte_tokenizer, rows

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


def test_a_document_that_spells_its_end_out_is_as_one_that_does_not(
    make_store: MakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    spelled = make_store(rows("ab<|endoftext|>", ("c", "d<|endoftext|>"), "e"))
    assert contents(spelled) == contents(make_store(rows("ab", ("c", "d"), "e")))
    assert spelled.meta.problems == {"double_eos": 2}
    assert "of 3: double_eos: 2, the text itself ends with the end-of-text token" in caplog.text


def test_prompts_are_marked_untrained(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c"), ("", "d")))
    assert contents(store) == (
        [*ids("ab"), *ids("c"), END, *ids("d"), END],
        [0, 0, 1, 1, 1, 1],
        [0, 4, 6],
    )


def test_begin_token_stands_before_each_document_and_belongs_to_its_first_segment(tmp_path: Path) -> None:
    encoder = byte_encoder(begin=True, close=True)
    store = tokenize_documents(all_of(rows(("a", "b"), "c")), encoder, tmp_path)
    assert contents(store) == ([257, *ids("a"), *ids("b"), END, 257, *ids("c"), END], [0, 0, 1, 1, 1, 1, 1], [0, 4, 7])


class MaskedEncoder:
    """Document i becomes the tokens 0 to i in one run, every other one trained; the second has closing tokens, the
    first two problems."""

    vocab_size = 300
    digest = "masked"

    def runs(self, documents: Iterable[Document]) -> Iterator[TokenRun]:
        for number, document in enumerate(documents, start=1):
            found = np.arange(number, dtype=np.int64)
            end = (7, 8) if number == 2 else ()
            problems = ("double_bos", "missing_eos") if number == 1 else ("double_bos",)
            yield TokenRun(found, found % 2 == 0, not document.continues, number, end, problems)


def test_masks_ends_and_problems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = all_of(rows("a", "b", "c"))
    for _ in range(2):
        caplog.clear()
        store = tokenize_documents(documents, MaskedEncoder(), tmp_path)  # type: ignore[arg-type]
        assert contents(store) == ([0, 0, 1, 7, 8, 0, 1, 2], [1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 5, 8])
        assert store.meta.problems == {"double_bos": 3, "missing_eos": 1}
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "of 3: double_bos: 3, the text itself begins" in warning and "missing_eos: 1, the chat" in warning


def test_many_small_writes_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*rows(*[("ab" * index, "c") for index in range(50)])]
    expected = contents(tokenize_documents(all_of(documents), byte_encoder(), tmp_path / "1"))
    monkeypatch.setattr("truthgpt.data.token_store.WRITE_TOKENS", 7)
    assert contents(tokenize_documents(all_of(documents), byte_encoder(), tmp_path / "2")) == expected


def test_pieces_of_one_text_join_without_end_of_text(make_store: MakeStore) -> None:
    pieces = [Document(str(i), (Segment(text),), "here", continues=i > 0) for i, text in enumerate(["ab", "c", "d"])]
    assert contents(make_store(pieces)) == ([*ids("abcd"), END], None, [0, 5])


def test_a_file_with_held_out_pieces_keeps_every_token(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(1500))
    (tmp_path / "a.txt").write_text(text)
    split = split_documents(TextSource([str(tmp_path / "a.txt")]), 0.1)
    assert split.validation is not None
    stores = [tokenize_documents(part, byte_encoder(), tmp_path) for part in (split.train, split.validation)]
    assert sum(int((store.tokens != END).sum()) for store in stores) == len(text)
    assert 1 < sum(store.meta.documents for store in stores) < 30
    assert stores[0].digest != stores[1].digest


def test_four_bytes_a_token_for_big_vocabularies(tmp_path: Path) -> None:
    for vocab_size, dtype in [(2**16, np.uint16), (2**16 + 1, np.uint32)]:
        store = tokenize_documents(all_of(rows("ab")), byte_encoder(vocab_size), tmp_path)
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
        first = tokenize_documents(documents, byte_encoder(), tmp_path)
        second = tokenize_documents(documents, byte_encoder(), tmp_path)
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
    digests = [
        tokenize_documents(documents, DocumentEncoder(tokenizer, 300), tmp_path).digest
        for documents, tokenizer in cases
    ]
    assert len(set(digests)) == 5
    used = byte_tokenizer()
    used(["a", "bc"], truncation=True, max_length=1)
    assert tokenize_documents(some, DocumentEncoder(used, 300), tmp_path).digest == digests[0]


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "trained.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_damaged_store_is_made_again(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    documents = all_of(rows(("ab", "c")))
    store = tokenize_documents(documents, byte_encoder(), tmp_path)
    expected, path = contents(store), store.folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"")
    with pytest.raises(DataError, match="token store"):
        TokenStore(store.folder)
    assert contents(tokenize_documents(documents, byte_encoder(), tmp_path)) == expected
    assert caplog.text.count("it is made again") == 1
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [store.folder.name]


class SlowSource(ListSource):
    """After the split has read it, waits for the file `go` behind its documents."""

    reads = 0
    go = Path()

    def documents(self) -> Iterator[Document]:
        yield from super().documents()
        self.reads += 1
        while self.reads > 1 and not self.go.exists():
            time.sleep(0.01)


LONG = rows(*["text " * 1000] * 200)


def _make(cache: Path, go: Path, lines: Path) -> None:
    """Make the store of `LONG` when `go` is there; log lines go to the file `lines`."""
    logging.basicConfig(filename=lines, level=logging.INFO, format="%(message)s", force=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    parallel_encoding.SMALL_CHARACTERS = 0
    token_store.WRITE_TOKENS = 1000
    source = SlowSource(LONG)
    source.go = go
    tokenize_documents(split_documents(source, 0).train, byte_encoder(), cache)


def _start(*arguments: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_make, args=arguments, daemon=True)
    process.start()
    return process


def _await(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_of_two_processes_one_waits_for_the_other(tmp_path: Path) -> None:
    cache, go = tmp_path / "cache", tmp_path / "go"
    first = _start(cache, go, tmp_path / "first")
    _await(lambda: list(cache.glob("tokens/.*.tmp-*/tokens.bin")))
    (working,) = cache.glob("tokens/.*.tmp-*")
    second = _start(cache, go, tmp_path / "second")
    waiting = "another process is tokenizing the same documents; waiting for it"
    _await(lambda: (tmp_path / "second").exists() and waiting in (tmp_path / "second").read_text())
    tokenize_documents(all_of(rows("other")), byte_encoder(), cache)  # clears up, but not what is being made
    assert list(cache.glob("tokens/.*.tmp-*")) == [working]
    go.touch()
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert "tokenized 200 documents" in (tmp_path / "first").read_text()
    said = (tmp_path / "second").read_text()
    assert "200 documents, 1,000,200 tokens, read from the cache" in said and "tokenized" not in said
    assert not list(cache.glob("tokens/.*"))


def test_waiting_process_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = _start(cache, tmp_path / "never", tmp_path / "first")
    _await(lambda: list(cache.glob("tokens/.*.tmp-*/tokens.bin")))
    go = tmp_path / "go"
    go.touch()
    second = _start(cache, go, tmp_path / "second")
    _await(lambda: (tmp_path / "second").exists() and "waiting" in (tmp_path / "second").read_text())
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0
    assert "tokenized 200 documents" in (tmp_path / "second").read_text()


def test_store_does_not_depend_on_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_encoding, "SMALL_CHARACTERS", 1)
    monkeypatch.setattr(parallel_encoding, "BATCH_CHARACTERS", 2**16)
    documents = rows(*[(f"prompt {index} ", "some words " * 4000) for index in range(20)])
    one, two = (
        tokenize_documents(all_of(documents), byte_encoder(begin=True), tmp_path / str(processes), processes)
        for processes in (1, 2)
    )
    assert one.digest == two.digest
    for name in ("tokens.bin", "trained.bin", "offsets.bin", "meta.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


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
        tokenize_documents(documents, byte_encoder(), tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"cache .*tokens/.*TRUTHGPT_CACHE_DIR"):
        tokenize_documents(all_of(rows("ab")), byte_encoder(), tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / "tokens").symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError, match=r"cache .*free some space"):
        tokenize_documents(all_of(rows("ab")), byte_encoder(), tmp_path)


def test_cached_tokens_are_checked_against_a_smaller_model(tmp_path: Path) -> None:
    documents = all_of(rows("he"))
    tokenizer = byte_tokenizer(merges=("he",))
    tokenizer.eos_token = "a"
    tokenize_documents(documents, DocumentEncoder(tokenizer, 257), tmp_path)
    with pytest.raises(DataError, match="token id 256, the model has ids 0 to 255"):
        tokenize_documents(documents, DocumentEncoder(tokenizer, 256), tmp_path)


def test_pickles_small_and_without_the_data(make_store: MakeStore) -> None:
    store = make_store(rows(("a", "text " * 10_000)))
    expected = contents(store)
    data = pickle.dumps(store)
    assert len(data) < 2000
    assert contents(pickle.loads(data)) == expected  # noqa: S301 - our own object, as a loader process gets it


def test_part_of_the_mask_is_read(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c"), ("", "d")))
    found = store.read_trained(1, 4)
    assert found.tolist() == [0, 1, 1] and not isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="every token is trained"):
        make_store(rows("ab")).read_trained(0, 1)


def test_meta_is_plain_json(make_store: MakeStore) -> None:
    store = make_store(rows(("ab", "c")))
    assert json.loads((store.folder / "meta.json").read_text()) == {
        "digest": store.digest,
        "dtype": "uint16",
        "documents": 1,
        "tokens": 4,
        "trained_tokens": 2,
        "largest_token_id": END,
        "problems": {},
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
