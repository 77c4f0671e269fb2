"""Which documents train and which validate: decided by a hash of each document, never by its place."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Document, Source
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)


class DocumentSet:
    """The chosen documents of a source, read lazily and in the source's order, as often as wanted.

    Costs one byte of memory a document of the source. A piece whose predecessor is not chosen is handed out as one
    that continues nothing.

    Args:
        source: where the documents come from.
        chosen: which of them belong to the set, bool `(documents of the source,)`.
        digest: fingerprint of the set: changes with any document or with the choice.
    """

    def __init__(self, source: Source, chosen: npt.NDArray[np.bool_], digest: str) -> None:
        self.digest = digest
        self._source = source
        self._chosen = chosen
        self._length = int(chosen.sum())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Document]:
        """The documents.

        Raises:
            DataError: the source has more or fewer documents than when the set was made.
        """
        total = len(self._chosen)
        before = False
        count = 0
        for count, document in enumerate(self._source.documents(), start=1):
            if count > total:
                break
            chosen = bool(self._chosen[count - 1])
            if chosen:
                yield replace(document, continues=False) if document.continues and not before else document
            before = chosen
        if count != total:
            raise DataError(f"the data changed while it was being read: it had {total} documents; start the run again")


@dataclass(frozen=True)
class Split:
    """Training and validation documents; `digest` is the fingerprint of all of them."""

    train: DocumentSet
    validation: DocumentSet | None
    digest: str


def split_documents(source: Source, validation_fraction: float, validation_source: Source | None = None) -> Split:
    """Read the source once and hold out documents for validation.

    The `round(fraction * documents)` documents with the smallest SHA-256 of their key are held out, at least one and
    never all, so the choice depends neither on their order nor on a seed. A source of one document, or a fraction of
    0, gives no validation set. With a `validation_source` nothing is held out. Memory: about 20 bytes a document.

    Raises:
        DataError: no document at all, or whatever the source raises.
    """
    hashes, digest = _hash_documents(source)
    if validation_source is not None:
        validation_hashes, validation_digest = _hash_documents(validation_source)
        return Split(
            train=_document_set(source, np.ones(len(hashes), dtype=np.bool_), digest),
            validation=_document_set(
                validation_source, np.ones(len(validation_hashes), dtype=np.bool_), validation_digest
            ),
            digest=hashlib.sha256(f"{digest} {validation_digest}".encode()).hexdigest(),
        )
    held_out = _held_out_count(len(hashes), validation_fraction)
    if held_out == 0:
        return Split(_document_set(source, np.ones(len(hashes), dtype=np.bool_), digest), None, digest)
    chosen = np.zeros(len(hashes), dtype=np.bool_)
    chosen[np.argsort(hashes, kind="stable")[:held_out]] = True
    return Split(_document_set(source, ~chosen, digest), _document_set(source, chosen, digest), digest)


def _held_out_count(documents: int, fraction: float) -> int:
    if fraction == 0:
        return 0
    if documents < 2:
        logger.warning(
            "the data is a single document, so none is held out for validation; set data.validation_path to have one"
        )
        return 0
    return min(max(round(fraction * documents), 1), documents - 1)


def _hash_documents(source: Source) -> tuple[npt.NDArray[np.uint64], str]:
    """First 64 bits of each key's SHA-256, and the SHA-256 of all keys and contents."""
    hashes = array("Q")
    content = hashlib.sha256()
    for document in source.documents():
        key = document.key.encode()
        hashes.append(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
        _add(content, key)
        content.update(bytes([document.continues, len(document.segments) & 0xFF]))
        for segment in document.segments:
            _add(content, segment.text.encode())
            content.update(bytes([segment.trained]))
    if not hashes:
        raise DataError("0 usable documents: the data source yields none; check data.source and data.path")
    return np.frombuffer(hashes, dtype=np.uint64), content.hexdigest()


def _add(digest: hashlib._Hash, data: bytes) -> None:
    """Add `data` with its length in front, so that no two lists of texts run together into the same bytes."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _document_set(source: Source, chosen: npt.NDArray[np.bool_], content_digest: str) -> DocumentSet:
    digest = hashlib.sha256(content_digest.encode() + np.packbits(chosen).tobytes()).hexdigest()
    return DocumentSet(source, chosen, digest)
