"""Tokenised documents as memory-mapped files, kept in a cache and made once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from truthgpt.data.split import DocumentSet
from truthgpt.data.tokenization import SpecialFrame, TokenRun, special_frame, tokenize
from truthgpt.errors import DataError, RunDirectoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of every cache key: a change of the files' layout or of how documents become tokens raises it."""
PROGRESS_INTERVAL_S = 5.0
ABANDONED_AFTER_S = 3600.0
"""A temporary folder in which nothing was written for so long belongs to a killed process and is removed."""

TOKENS_FILE = "tokens.bin"
TRAINED_FILE = "trained.bin"
OFFSETS_FILE = "offsets.bin"
META_FILE = "meta.json"


@dataclass(frozen=True)
class StoreMeta:
    """Contents of `meta.json`. Sizes follow from the counts; a file of another size is damaged."""

    digest: str
    dtype: str
    documents: int
    tokens: int
    trained_tokens: int
    largest_token_id: int

    def file_sizes(self) -> dict[str, int]:
        """Bytes each file must have. Without untrained tokens there is no mask file."""
        sizes = {
            TOKENS_FILE: self.tokens * np.dtype(self.dtype).itemsize,
            OFFSETS_FILE: (self.documents + 1) * np.dtype(np.int64).itemsize,
        }
        return sizes if self.trained_tokens == self.tokens else {**sizes, TRAINED_FILE: self.tokens}


class TokenStore:
    """Tokens of all documents, one after the other, each closed by an end-of-text token.

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
    documents: DocumentSet, tokenizer: PreTrainedTokenizerFast, vocab_size: int, cache_dir: Path
) -> TokenStore:
    """Tokens of `documents`, from the cache when they were made before.

    A document is tokenised segment by segment. Before the first comes what the tokenizer itself puts there (a
    beginning-of-text token, if it has the habit), behind the last the end-of-text token, which is trained. Pieces that
    continue each other are one document. The store is written in a folder of its own and renamed whole: a killed or a
    second writer never leaves half a store.

    Args:
        documents: what to tokenise.
        tokenizer: a fast tokenizer with an end-of-text token.
        vocab_size: number of the model's token ids; decides between 2 and 4 bytes a token.
        cache_dir: folder of all stores, made if missing.

    Raises:
        DataError: a token id the model does not have, an unusable tokenizer, or whatever the source raises.
        RunDirectoryError: the cache cannot be written, or its disk is full.
    """
    frame = special_frame(tokenizer)
    _check_largest(max(*frame.prefix, frame.end_of_text, 0), vocab_size)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    identity = [str(FORMAT_VERSION), documents.digest, tokenizer_digest(tokenizer), repr(frame), dtype]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    folder = cache_dir / "tokens" / digest[:32]
    store = _open_cached(folder)
    if store is None:
        runs = _with_progress(tokenize(documents, tokenizer, vocab_size), len(documents))
        store = _write_store(folder, runs, frame, digest, dtype)
    _check_largest(store.meta.largest_token_id, vocab_size)
    return store


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides how the tokenizer cuts text (its `tokenizer.json`)."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


class _StoreWriter:
    """Writes the files of a store into an empty folder."""

    def __init__(self, folder: Path, frame: SpecialFrame, dtype: str) -> None:
        self._folder = folder
        self._prefix = np.array(frame.prefix, dtype=np.int64)
        self._end_of_text = np.array([frame.end_of_text], dtype=np.int64)
        self._dtype = dtype
        self._offsets = array("q")
        self._tokens = 0
        self._trained_tokens = 0
        self._largest = 0
        with ExitStack() as files:
            self._tokens_file = files.enter_context((folder / TOKENS_FILE).open("wb"))
            self._trained_file = files.enter_context((folder / TRAINED_FILE).open("wb"))
            self._files = files.pop_all()

    def add(self, run: TokenRun) -> None:
        """Append a run; one that opens a document closes the document before."""
        if run.opens:
            self._close_document()
            self._offsets.append(self._tokens)
            self._append(self._prefix, run.trained)
        self._append(run.ids, run.trained)

    def finish(self, digest: str) -> None:
        """Close the last document and put everything on disk, `meta.json` last."""
        self._close_document()
        documents = len(self._offsets)
        self._offsets.append(self._tokens)
        with self._files:
            for file in (self._tokens_file, self._trained_file):
                file.flush()
                os.fsync(file.fileno())
        if self._trained_tokens == self._tokens:
            (self._folder / TRAINED_FILE).unlink()
        _write_synced(self._folder / OFFSETS_FILE, self._offsets.tobytes())
        meta = StoreMeta(digest, self._dtype, documents, self._tokens, self._trained_tokens, self._largest)
        _write_synced(self._folder / META_FILE, json.dumps(asdict(meta)).encode())

    def close(self) -> None:
        """Give the open files back, finished or not."""
        self._files.close()

    def _close_document(self) -> None:
        if self._offsets:
            self._append(self._end_of_text, trained=True)

    def _append(self, ids: npt.NDArray[np.int64], trained: bool) -> None:
        if ids.size == 0:
            return
        self._tokens_file.write(ids.astype(self._dtype).tobytes())
        self._trained_file.write((b"\1" if trained else b"\0") * ids.size)
        self._tokens += ids.size
        self._trained_tokens += ids.size if trained else 0
        self._largest = max(self._largest, int(ids.max()))


def _write_store(folder: Path, runs: Iterator[TokenRun], frame: SpecialFrame, digest: str, dtype: str) -> TokenStore:
    """Write a store beside its place and rename it there; a concurrent writer that was faster wins."""
    started = time.monotonic()
    with _cache_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_abandoned(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    try:
        with _cache_errors(folder):
            writer = _StoreWriter(temporary, frame, dtype)
        try:
            for run in runs:
                with _cache_errors(folder):
                    writer.add(run)
            with _cache_errors(folder):
                writer.finish(digest)
        finally:
            with _cache_errors(folder):
                writer.close()
        with _cache_errors(folder):
            _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    store = TokenStore(folder)
    logger.info(
        "tokenized %d documents, %d tokens, in %.1f s",
        store.meta.documents,
        len(store),
        time.monotonic() - started,
    )
    return store


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / META_FILE).is_file():
            raise


def _open_cached(folder: Path) -> TokenStore | None:
    """The store of an earlier run; a damaged one is removed."""
    if not folder.is_dir():
        return None
    try:
        store = TokenStore(folder)
    except DataError as error:
        logger.warning("%s; it is made again", error)
        with _cache_errors(folder):
            shutil.rmtree(folder)
        return None
    logger.info("%d documents, %d tokens, read from the cache %s", store.meta.documents, len(store), folder)
    return store


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


def _with_progress(runs: Iterator[TokenRun], documents: int) -> Iterator[TokenRun]:
    """Pass `runs` on, with a line in the log about every five seconds."""
    tokens = 0
    last = time.monotonic()
    for run in runs:
        tokens += run.ids.size
        if time.monotonic() - last > PROGRESS_INTERVAL_S:
            last = time.monotonic()
            logger.info("tokenizing: %d of %d documents, %d tokens", run.document, documents, tokens)
        yield run


def _check_largest(token_id: int, vocab_size: int) -> None:
    if token_id >= vocab_size:
        raise DataError(
            f"the tokenizer uses token id {token_id}, the model has ids 0 to {vocab_size - 1}; use the model's own "
            f"tokenizer, or a model with model.config.vocab_size of at least {token_id + 1}"
        )


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left behind. A live writer is safe: it writes more often than once an hour."""
    for leftover in folder.glob(".*.tmp-*"):
        newest = max((file.stat().st_mtime for file in [leftover, *leftover.glob("*")]), default=0.0)
        if time.time() - newest > ABANDONED_AFTER_S:
            shutil.rmtree(leftover, ignore_errors=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into an error that names the cache and the way out."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"token cache {folder}: {error.strerror or error}; free some space, or set TRUTHGPT_CACHE_DIR to a folder "
            "that can be written"
        ) from error
