"""Tokenised documents as memory-mapped files, kept in a cache and made once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truthgpt.data.cache_entry import cache_errors, exclusive_maker, new_folder, write_synced
from truthgpt.data.parallel_encoding import parallel_runs
from truthgpt.data.split import DocumentSet
from truthgpt.data.tokenization import DocumentEncoder, TokenRun
from truthgpt.errors import DataError
from truthgpt.runtime.task_progress import task_progress

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Part of every cache key: a change of the files' layout raises it."""
WRITE_TOKENS = 2**18
"""Tokens collected before they are written."""

TOKENS_FILE = "tokens.bin"
TRAINED_FILE = "trained.bin"
OFFSETS_FILE = "offsets.bin"
META_FILE = "meta.json"

PROBLEMS = {
    "double_bos": "the text itself begins with the begin-of-text token that the tokenizer adds; one of the two is kept",
    "double_eos": "the text itself ends with the end-of-text token; no second one was added",
    "missing_eos": "the chat template puts no end-of-text token behind the last answer; one was added",
}
"""What the problems of a run mean, for the log."""


@dataclass(frozen=True)
class StoreMeta:
    """Contents of `meta.json`. Sizes follow from the counts; a file of another size is damaged."""

    digest: str
    dtype: str
    documents: int
    tokens: int
    trained_tokens: int
    largest_token_id: int
    problems: dict[str, int]
    """Documents that have each of the problems of `TokenRun.problems`."""

    def file_sizes(self) -> dict[str, int]:
        """Bytes each file must have. Without untrained tokens there is no mask file."""
        sizes = {
            TOKENS_FILE: self.tokens * np.dtype(self.dtype).itemsize,
            OFFSETS_FILE: (self.documents + 1) * np.dtype(np.int64).itemsize,
        }
        return sizes if self.trained_tokens == self.tokens else {**sizes, TRAINED_FILE: self.tokens}


class TokenStore:
    """Tokens of all documents, one after the other, each closed by its end-of-text token.

    Arrays are mapped on first use and never pickled, so a store costs a loader process nothing.

    Raises:
        DataError: the folder holds no store, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)

    @property
    def digest(self) -> str:
        """Fingerprint of the documents, the split and the tokenizer."""
        return self.meta.digest

    def __len__(self) -> int:
        """Number of tokens."""
        return self.meta.tokens

    @cached_property
    def tokens(self) -> npt.NDArray[np.uint16 | np.uint32]:
        """Token ids, `(tokens,)`."""
        return np.memmap(self.folder / TOKENS_FILE, dtype=self.meta.dtype, mode="r")

    @cached_property
    def trained(self) -> npt.NDArray[np.uint8] | None:
        """1 where the loss counts the token, `(tokens,)`; None when it counts every one."""
        if self.meta.trained_tokens == self.meta.tokens:
            return None
        return np.memmap(self.folder / TRAINED_FILE, dtype=np.uint8, mode="r")

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Document i is `tokens[offsets[i]:offsets[i + 1]]`, `(documents + 1,)`."""
        return np.memmap(self.folder / OFFSETS_FILE, dtype=np.int64, mode="r")

    def read_trained(self, first: int, end: int) -> npt.NDArray[np.uint8]:
        """`trained[first:end]`, read instead of mapped: mapped pages would stay in the memory of the process.

        Raises:
            ValueError: the loss counts every token, so there is no mask.
        """
        if self.trained is None:
            raise ValueError(f"{self.folder}: every token is trained")
        return np.fromfile(self.folder / TRAINED_FILE, dtype=np.uint8, count=end - first, offset=first)

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "meta": self.meta}


def default_cache_dir() -> Path:
    """`$TRUTHGPT_CACHE_DIR`, else `$XDG_CACHE_HOME/truthgpt`, else `~/.cache/truthgpt`."""
    own = os.environ.get("TRUTHGPT_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "truthgpt"


def tokenize_documents(
    documents: DocumentSet, encoder: DocumentEncoder, cache_dir: Path, processes: int = 1
) -> TokenStore:
    """Tokens of `documents`, from the cache when they were made before.

    Behind each document come the ids that close it. Pieces that continue each other are one document. The store is
    written in a folder of its own and renamed whole: a killed writer never leaves half a store. Of two processes that
    want the same store one makes it and the other waits.

    Args:
        documents: what to tokenise.
        encoder: turns documents into ids; its number of token ids decides between 2 and 4 bytes a token.
        cache_dir: folder of all caches, made if missing.
        processes: tokenising processes; the store does not depend on their number.

    Raises:
        DataError: a token id the model does not have, or whatever the source and the encoder raise.
        RunDirectoryError: the cache cannot be written, or its disk is full.
    """
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    identity = [str(FORMAT_VERSION), documents.digest, encoder.digest, dtype]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    folder = cache_dir / "tokens" / digest[:32]
    store = _open_cached(folder)
    if store is None:
        with exclusive_maker(folder, "tokenizing the same documents"):
            store = _open_cached(folder)
            if store is None:
                _warn_if_damaged(folder)
                with closing(parallel_runs(encoder, documents, processes)) as runs:
                    store = _write_store(folder, _with_progress(runs, len(documents)), digest, dtype)
    _check_largest(store.meta.largest_token_id, encoder.vocab_size)
    _report_problems(store.meta)
    return store


class _StoreWriter:
    """Writes the files of the store that shall be `folder` into the empty folder `temporary`."""

    def __init__(self, folder: Path, temporary: Path, dtype: str) -> None:
        self._folder = folder
        self._temporary = temporary
        self._dtype = dtype
        self._offsets = array("q")
        self._end: tuple[int, ...] = ()
        self._ids: list[npt.NDArray[np.int64]] = []
        self._trained: list[npt.NDArray[np.bool_]] = []
        self._unwritten = 0
        self._tokens = 0
        self._trained_tokens = 0
        self._largest = 0
        self._problems: Counter[str] = Counter()
        with ExitStack() as files:
            self._tokens_file = files.enter_context((temporary / TOKENS_FILE).open("wb"))
            self._trained_file = files.enter_context((temporary / TRAINED_FILE).open("wb"))
            self._files = files.pop_all()

    def add(self, run: TokenRun) -> None:
        """Append a run; one that opens a document closes the one before. RunDirectoryError when the disk is full."""
        if run.opens:
            self._close_document()
            self._offsets.append(self._tokens)
        self._append(run.ids, run.trained)
        self._end = run.end
        self._problems.update(run.problems)
        if self._unwritten >= WRITE_TOKENS:
            self._write()

    def finish(self, digest: str) -> None:
        """Close the last document and put everything on disk, `meta.json` last. Raises as `add`."""
        self._close_document()
        self._write()
        documents = len(self._offsets)
        self._offsets.append(self._tokens)
        with cache_errors(self._folder):
            with self._files:
                for file in (self._tokens_file, self._trained_file):
                    file.flush()
                    os.fsync(file.fileno())
            if self._trained_tokens == self._tokens:
                (self._temporary / TRAINED_FILE).unlink()
            write_synced(self._temporary / OFFSETS_FILE, self._offsets.tobytes())
            counts = (documents, self._tokens, self._trained_tokens, self._largest)
            meta = StoreMeta(digest, self._dtype, *counts, problems=dict(sorted(self._problems.items())))
            write_synced(self._temporary / META_FILE, json.dumps(asdict(meta)).encode())

    def close(self) -> None:
        """Give the open files back, finished or not. Raises as `add`."""
        with cache_errors(self._folder):
            self._files.close()

    def _close_document(self) -> None:
        if self._end:
            self._append(np.array(self._end, dtype=np.int64), trained=True)

    def _append(self, ids: npt.NDArray[np.int64], trained: bool | npt.NDArray[np.bool_]) -> None:
        self._ids.append(ids)
        self._trained.append(trained if isinstance(trained, np.ndarray) else np.full(ids.size, trained, np.bool_))
        self._tokens += ids.size
        self._unwritten += ids.size

    def _write(self) -> None:
        """Write what is collected."""
        if self._unwritten:
            ids, trained = np.concatenate(self._ids), np.concatenate(self._trained)
            self._largest = max(self._largest, int(ids.max()))
            self._trained_tokens += int(np.count_nonzero(trained))
            with cache_errors(self._folder):
                self._tokens_file.write(ids.astype(self._dtype).data)
                self._trained_file.write(trained.data)
        self._ids, self._trained, self._unwritten = [], [], 0


def _write_store(folder: Path, runs: Iterable[TokenRun], digest: str, dtype: str) -> TokenStore:
    """Write a store beside its place and rename it there."""
    started_s = time.monotonic()
    with new_folder(folder) as temporary:
        with cache_errors(folder):
            writer = _StoreWriter(folder, temporary, dtype)
        with closing(writer):
            for run in runs:
                writer.add(run)
            writer.finish(digest)
    store = TokenStore(folder)
    elapsed_s = time.monotonic() - started_s
    logger.info("tokenized %s, in %.1f s", _amount(store), elapsed_s)
    return store


def _open_cached(folder: Path) -> TokenStore | None:
    """The store of an earlier run, if it is whole."""
    try:
        store = TokenStore(folder)
    except DataError:
        return None
    logger.info("%s, read from the cache %s", _amount(store), folder)
    return store


def _amount(store: TokenStore) -> str:
    documents = store.meta.documents
    return f"{documents:,} document{'' if documents == 1 else 's'}, {len(store):,} tokens"


def _warn_if_damaged(folder: Path) -> None:
    if folder.is_dir():
        try:
            TokenStore(folder)
        except DataError as error:
            logger.warning("%s; it is made again", error)


def _read_meta(folder: Path) -> StoreMeta:
    try:
        meta = StoreMeta(**json.loads((folder / META_FILE).read_bytes()))
        sizes = {name: (folder / name).stat().st_size for name in meta.file_sizes()}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: no usable token store ({error})") from error
    for name, expected in meta.file_sizes().items():
        if sizes[name] != expected:
            raise DataError(f"{folder / name}: damaged token store: {sizes[name]} bytes instead of {expected}")
    return meta


def _with_progress(runs: Iterable[TokenRun], documents: int) -> Iterator[TokenRun]:
    """Pass `runs` on and show how many of the documents are done."""
    with task_progress("tokenizing", documents, "documents") as advance:
        done = 0
        for run in runs:
            yield run
            if run.document > done:
                advance(run.document - done)
                done = run.document


def _report_problems(meta: StoreMeta) -> None:
    if meta.problems:
        found = "; ".join(f"{name}: {documents}, {PROBLEMS[name]}" for name, documents in meta.problems.items())
        logger.warning("documents with a problem, of %d: %s", meta.documents, found)


def _check_largest(token_id: int, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise DataError(
            f"the tokenizer uses token id {token_id}, the model has ids 0 to {vocab_size - 1}; use the model's own "
            f"tokenizer, or a model with model.config.vocab_size of at least {token_id + 1}"
        )
