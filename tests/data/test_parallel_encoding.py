from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.data import parallel_encoding, tokenization
from truthgpt.data.base import Document, Segment
from truthgpt.data.parallel_encoding import parallel_runs
from truthgpt.data.tokenization import DocumentEncoder, TokenRun
from truthgpt.errors import DataError

from .conftest import BEGIN, END, byte_encoder, byte_tokenizer

Plain = tuple[list[int], object, bool, int, tuple[int, ...], tuple[str, ...]]


def plain(runs: Iterable[TokenRun]) -> list[Plain]:
    return [
        (
            run.ids.tolist(),
            run.trained if isinstance(run.trained, bool) else run.trained.tolist(),
            run.opens,
            run.document,
            run.end,
            run.problems,
        )
        for run in runs
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is worth processes, a few hundred characters are a batch and 2,000 a huge document."""
    for name, value in [("SMALL_CHARACTERS", 1), ("BATCH_CHARACTERS", 300), ("HUGE_CHARACTERS", 2000)]:
        monkeypatch.setattr(parallel_encoding, name, value)


def some_documents(seed: int, count: int) -> list[Document]:
    """Pieces, prompts, empty texts, huge texts and texts with a begin or an end token of their own."""
    draw = random.Random(seed)
    documents = []
    for index in range(count):
        length = draw.choice([0, 3, 40, 40, 40, 250, 301, 2500])
        begin = BEGIN if draw.random() < 0.1 else ""
        segments = [Segment(f"{begin}{index} " + "ab\n" * length, trained=draw.random() < 0.7)]
        if draw.random() < 0.3:
            segments.append(Segment("" if draw.random() < 0.5 else "the end"))
        if draw.random() < 0.2:
            segments.append(Segment(END))
        documents.append(Document(str(index), tuple(segments), f"row {index}", index > 0 and draw.random() < 0.3))
    return documents


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_same_runs_in_the_same_order(seed: int, processes: int) -> None:
    documents = some_documents(seed, count=150)
    encoder = byte_encoder(begin=True)
    expected = plain(encoder.runs(documents))
    assert plain(parallel_runs(encoder, iter(documents), processes)) == expected
    assert {document for _, _, _, document, _, _ in expected} == set(range(1, 151))
    assert {end for _, _, _, _, end, _ in expected} == {(), (encoder.frame.end_of_text,)}


@given(sizes=st.lists(st.integers(0, 40), max_size=60))
@settings(max_examples=200, deadline=None)
def test_batches_hold_every_document_and_not_too_much(sizes: list[int]) -> None:
    documents = [Document(str(i), (Segment("x" * size),), "here") for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_encoding, "BATCH_CHARACTERS", 30)
        patch.setattr(parallel_encoding, "BATCH_DOCUMENTS", 4)
        batches = list(parallel_encoding._batches(documents))
    assert [document for batch in batches for document in batch] == documents
    assert all(len(batch) == 1 or sum(len(d.text) for d in batch) <= 30 for batch in batches)
    assert all(0 < len(batch) <= 4 for batch in batches)


def starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(encoder: DocumentEncoder, processes: int) -> None:
        raise AssertionError("processes are started")

    monkeypatch.setattr(parallel_encoding, "_started", refuse)


@pytest.mark.parametrize(("characters", "processes"), [(3_999_999, 8), (4_000_001, 1), (0, 2)])
def test_little_text_or_one_process_starts_none(
    characters: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts_no_process(monkeypatch)
    documents = [Document("a", (Segment("x" * characters),), "here")]
    runs = list(parallel_runs(byte_encoder(), documents, processes))
    assert sum(run.ids.size for run in runs) == characters
    assert list(parallel_runs(byte_encoder(), [], 4)) == []


def test_without_fork_everything_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    starts_no_process(monkeypatch)
    monkeypatch.setattr(parallel_encoding, "SMALL_CHARACTERS", 1)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    documents = some_documents(1, count=10)
    assert plain(parallel_runs(byte_encoder(), documents, 4)) == plain(byte_encoder().runs(documents))


class CountedList:
    """Counts the documents taken."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.taken = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.taken += 1
            yield document


@pytest.mark.usefixtures("small_batches")
def test_reads_only_a_few_batches_ahead() -> None:
    documents = CountedList([Document(str(i), (Segment("x" * 100),), "here") for i in range(1000)])
    with closing(parallel_runs(byte_encoder(), documents, 2)) as runs:
        for _ in islice(runs, 30):
            assert documents.taken <= 30 + 3 * (2 * parallel_encoding.BATCHES_AHEAD + 2)


@pytest.mark.usefixtures("small_batches")
def test_error_of_a_worker_is_the_same_error() -> None:
    tokenizer = byte_tokenizer(merges=("he",))
    documents = [Document(str(i), (Segment("x" * 100),), "here") for i in range(100)]
    documents[60] = Document("bad", (Segment("he"),), "rows.jsonl:61")
    encoder = DocumentEncoder(tokenizer, 258)
    encoder.vocab_size = 256
    with pytest.raises(DataError) as alone:
        list(encoder.runs(documents))
    with pytest.raises(DataError) as parallel:
        list(parallel_runs(encoder, documents, 2))
    assert str(parallel.value) == str(alone.value)
    assert str(alone.value).startswith("rows.jsonl:61: the tokenizer gives token id 256 ('he')")
    assert multiprocessing.active_children() == []


class BrokenEncoder:
    """Fails in a way nobody expects."""

    vocab_size = 300

    def runs(self, documents: Iterable[Document]) -> Iterator[TokenRun]:
        raise ZeroDivisionError("a bug")


@pytest.mark.usefixtures("small_batches")
def test_unexpected_error_of_a_worker_ends_it_and_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"tokenizing process 0 \(pid \d+\) ended with exit code 1; its error stands"):
        list(parallel_runs(BrokenEncoder(), some_documents(1, 20), 2))  # type: ignore[arg-type]
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_is_named(victim: int) -> None:
    documents = [Document(str(i), (Segment("x" * 100),), "here") for i in range(1000)]
    with closing(parallel_runs(byte_encoder(), documents, 2)) as runs:
        next(runs)
        # Not by their ids, which begin again at the smallest when the largest has been given out.
        children = sorted(multiprocessing.active_children(), key=lambda child: int(child.name.rpartition("-")[2]))
        children[victim].kill()
        started_s = time.monotonic()
        with pytest.raises(
            DataError, match=rf"process {victim} .*was killed by signal 9 \(SIGKILL\).*data.num_workers"
        ):
            list(runs)
        assert time.monotonic() - started_s < 60
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("small_batches")
def test_error_of_the_source_and_early_end_leave_no_process() -> None:
    def failing() -> Iterator[Document]:
        yield from some_documents(1, 200)
        raise DataError("broken row")

    with pytest.raises(DataError, match="broken row"):
        list(parallel_runs(byte_encoder(begin=True), failing(), 2))
    assert multiprocessing.active_children() == []
    with closing(parallel_runs(byte_encoder(), some_documents(1, 200), 2)) as runs:
        next(runs)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def _tokenize_for_ever(path: Path) -> None:
    """Tokenise in a process group of its own; ids of the workers and a traceback, if any, go to files."""
    os.setsid()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    os.dup2(os.open(path / "errors", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    documents = (Document(str(i), (Segment("x" * 1000),), "here") for i in itertools.count())
    with closing(parallel_runs(byte_encoder(), documents, 2)) as runs:
        for _ in runs:
            if not (path / "workers").exists():
                workers = [str(child.pid) for child in multiprocessing.active_children()]
                (path / "new").write_text(" ".join(workers))
                (path / "new").rename(path / "workers")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("how", "group"), [("SIGKILL", 0), ("SIGTERM", 0), ("SIGINT", 1), ("SIGTERM", 1)])
def test_no_worker_outlives_the_run(how: str, group: int, tmp_path: Path) -> None:
    """However it ends, and whoever gets the signal: the process alone or, as with Ctrl-C, its whole group."""
    process = multiprocessing.get_context("fork").Process(target=_tokenize_for_ever, args=(tmp_path,))
    process.start()
    try:
        wait_until((tmp_path / "workers").exists, 60)
        workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
        assert len(workers) == 2
        # The run decides what a signal to the group means, and only it tells of one.
        wait_until(lambda: all({signal.SIGINT, signal.SIGTERM} <= ignored_signals(worker) for worker in workers), 60)
        send = os.killpg if group else os.kill
        for _ in range(3):  # C code that clears its errors can lose an interrupt, as it can lose a Ctrl-C
            send(process.pid or 0, signal.Signals[how])
            process.join(10)
            if process.exitcode is not None:
                break
    finally:
        if process.is_alive():  # or it would hold both cores, and the test run open, for ever
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
    assert process.exitcode == (1 if how == "SIGINT" else -signal.Signals[how])
    wait_until(lambda: not any(map(is_running, workers)), 60)
    errors = (tmp_path / "errors").read_text()
    if how != "SIGINT":
        assert errors == ""
        return
    # One report, the run's own; before the interrupt it may tell of an error that Python was just handling.
    reports = [line for line in errors.splitlines() if line.startswith("Process ")]
    assert reports == [f"Process {process.name}:"] and errors.endswith("KeyboardInterrupt\n"), errors


ABANDONED = """
import itertools, sys
from tests.data.conftest import byte_encoder
from truthgpt.data.base import Document, Segment
from truthgpt.data.parallel_encoding import parallel_runs
documents = (Document(str(i), (Segment("x" * 1000),), "here") for i in itertools.count())
runs = parallel_runs(byte_encoder(), documents, 2)
next(runs)
sys.exit(0)
"""


def test_leaving_without_closing_does_not_hang() -> None:
    root = Path(__file__).parents[2]
    finished = subprocess.run([sys.executable, "-c", ABANDONED], cwd=root, capture_output=True, timeout=60)
    assert finished.returncode == 0


def ignored_signals(pid: int) -> set[int]:
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:")]
    return {number for number in range(1, 65) if int(mask.split()[1], 16) >> (number - 1) & 1}


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a dead entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _peaks(answer: Connection[Any, Any]) -> None:
    """Peak memory in bytes before, and after, a document of 5 MiB that follows two of 1 MiB."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    peaks: list[int] = []

    def documents() -> Iterator[Document]:
        for index, mebibytes in enumerate([1, 1, 5, 0]):
            if index > 1:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            yield Document(str(index), (Segment("ab ab ab\n" * (mebibytes * 2**20 // 9)),), "here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_encoding, "SMALL_CHARACTERS", 2**20)
        patch.setattr(parallel_encoding, "HUGE_CHARACTERS", 2**19)
        patch.setattr(tokenization, "BATCH_CHARACTERS", 2**16)  # what a batch costs stays out of the figure
        patch.setattr(tokenization, "PIECE_CHARACTERS", 2**12)
        tokens = sum(run.ids.size for run in parallel_runs(byte_encoder(), documents(), 2))
    answer.send((tokens, peaks))


def test_a_huge_document_is_not_copied_often() -> None:
    context = multiprocessing.get_context("fork")
    answer, theirs = context.Pipe()
    process = context.Process(target=_peaks, args=(theirs,))
    process.start()
    theirs.close()  # else a process that fails is waited for for ever
    tokens, (before, after) = answer.recv()
    process.join()  # else it may still be there where the next test counts processes
    assert tokens == (2 * (2**20 // 9) + 5 * 2**20 // 9) * 9
    assert after - before < 4 * 4 * 2**20
