"""What a source holds, known without reading it again."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Conversation, Document, IdentifiedSource, Source
from truthgpt.data.cache_entry import cache_errors, exclusive_maker, new_folder, write_synced
from truthgpt.data.file_identity import is_recent
from truthgpt.data.holdout import key_hash
from truthgpt.errors import DataError, RunDirectoryError
from truthgpt.runtime.task_progress import task_progress

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Part of every key: a change of the files' layout, of what is hashed or of which rows are documents raises it."""
HASHES_FILE = "hashes.bin"
META_FILE = "meta.json"

_ENCODE_CHARACTERS = 2**20


@dataclass(frozen=True)
class SourceIndex:
    """What a pass over a source found.

    `hashes` are the first 64 bits of each document's hashed key, uint64 `(documents,)`. `digest` is the fingerprint of
    all keys and contents, not of the places they were read from. `identity` is what the source said of itself then.
    """

    hashes: npt.NDArray[np.uint64]
    digest: str
    identity: str | None


@dataclass(frozen=True)
class _IndexMeta:
    """Contents of `meta.json`."""

    digest: str
    documents: int


def index_source(source: Source, cache_dir: Path | None = None) -> SourceIndex:
    """Hashes and digest of a source's documents: from the cache when it is the one read before, else by reading.

    A source without an identity is read every time. An index is kept only when the identity was the same before and
    after reading and holds no time of the last two seconds.

    Args:
        source: where the documents come from.
        cache_dir: folder of all caches; None: keep nothing.

    Raises:
        DataError: no document at all, or whatever the source raises.
    """
    identity = source_identity(source)
    if identity is None or cache_dir is None:
        return _read_source(source, identity)
    key = hashlib.sha256(f"{FORMAT_VERSION}\n{identity}".encode()).hexdigest()[:32]
    folder = cache_dir / "index" / key
    index = _open(folder, identity)
    if index is not None:
        return index
    try:
        with exclusive_maker(folder, "reading the same documents"):
            index = _open(folder, identity)
            if index is None:
                started_s = time.time()
                index = _read_source(source, identity)
                if source_identity(source) == identity and not is_recent(identity, started_s):
                    _write(folder, index)
    except RunDirectoryError as error:
        logger.warning("%s; the documents are read at every start", error)
    return index or _read_source(source, identity)


def source_identity(source: Source) -> str | None:
    """What the source says of itself without reading its documents; None when it cannot."""
    return source.identity() if isinstance(source, IdentifiedSource) else None


def _read_source(source: Source, identity: str | None) -> SourceIndex:
    hashes = array("Q")
    content = hashlib.sha256()
    with task_progress("reading", None, "documents") as advance:
        for document in source.documents():
            hashes.append(key_hash(document.key))
            _add_document(content, document)
            advance(1)
    if not hashes:
        raise DataError("0 usable documents: the data source yields none; check data.source and data.path")
    return SourceIndex(np.frombuffer(hashes, dtype=np.uint64), content.hexdigest(), identity)


def _add_document(digest: hashlib._Hash, document: Document) -> None:
    _add_text(digest, document.key)
    digest.update(bytes([document.continues, document.conversation is not None]))
    digest.update(len(document.segments).to_bytes(8, "little"))
    for segment in document.segments:
        _add_text(digest, segment.text)
        digest.update(bytes([segment.trained]))
    if document.conversation is not None:
        _add_text(digest, _conversation_json(document.conversation))


def _add_text(digest: hashlib._Hash, text: str) -> None:
    """Add `text` with its length in front, so that no two lists of texts run together into the same bytes."""
    digest.update(len(text).to_bytes(8, "little"))
    for start in range(0, len(text), _ENCODE_CHARACTERS):  # a huge text is never there a second time
        digest.update(text[start : start + _ENCODE_CHARACTERS].encode())


def _conversation_json(conversation: Conversation) -> str:
    """Keys stay in their order: a template may print a tool as it stands."""
    parts: list[object] = [conversation.messages, conversation.tools, conversation.trained]
    if conversation.context:
        parts.append(conversation.context)
    return json.dumps(parts, default=dict)


def _open(folder: Path, identity: str) -> SourceIndex | None:
    """The index in `folder`; None when there is none, or one that is damaged."""
    path = folder / HASHES_FILE
    try:
        meta = _IndexMeta(**json.loads((folder / META_FILE).read_bytes()))
        if path.stat().st_size != meta.documents * 8:
            return None
        hashes: npt.NDArray[np.uint64] = np.memmap(path, dtype=np.uint64, mode="r")
    except (OSError, ValueError, TypeError):
        return None
    return SourceIndex(hashes, meta.digest, identity)


def _write(folder: Path, index: SourceIndex) -> None:
    with new_folder(folder) as temporary, cache_errors(folder):
        write_synced(temporary / HASHES_FILE, index.hashes.tobytes())
        meta = _IndexMeta(index.digest, len(index.hashes))
        write_synced(temporary / META_FILE, json.dumps(asdict(meta)).encode())
