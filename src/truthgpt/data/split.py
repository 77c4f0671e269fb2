"""Which documents train and which validate: decided by a hash of each document, never by its place."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Document, Source
from truthgpt.data.holdout import held_out_mask
from truthgpt.data.source_index import SourceIndex, index_source, source_identity
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
        identity: what the source said of itself when its documents were counted; None when it cannot.
    """

    def __init__(self, source: Source, chosen: npt.NDArray[np.bool_], digest: str, identity: str | None) -> None:
        self.digest = digest
        self._source = source
        self._chosen = chosen
        self._identity = identity
        self._length = int(chosen.sum())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Document]:
        """The documents.

        Raises:
            DataError: the source is not the one the set was made of: more or fewer documents, or another identity.
        """
        total = len(self._chosen)
        before = False
        count = 0
        where = "the data source"
        for count, document in enumerate(self._source.documents(), start=1):
            if count > total:
                raise _changed(document.where, f"a document behind the {total} there were")
            where = document.where
            chosen = bool(self._chosen[count - 1])
            if chosen:
                yield replace(document, continues=False) if document.continues and not before else document
            before = chosen
        if count < total:
            raise _changed(where, f"the last of {count} documents, there were {total}")
        if source_identity(self._source) != self._identity:
            raise _changed("the data source", "a file has another size or time than at the start")


@dataclass(frozen=True)
class Split:
    """Training and validation documents; `digest` is the fingerprint of all of them."""

    train: DocumentSet
    validation: DocumentSet | None
    digest: str


def split_documents(
    source: Source,
    validation_fraction: float,
    validation_source: Source | None = None,
    cache_dir: Path | None = None,
) -> Split:
    """Hold out documents for validation; reads the source once, or not at all when its index is in the cache.

    The `round(fraction * documents)` documents with the smallest SHA-256 of their key are held out, at least one and
    never all, so the choice depends neither on their order nor on a seed. A source of one document, or a fraction of
    0, gives no validation set. With a `validation_source` nothing is held out. Memory: about 20 bytes a document.

    Args:
        source: where the documents come from.
        validation_fraction: share of them that is held out.
        validation_source: validation documents of their own.
        cache_dir: folder of all caches; None: the source is read at every call.

    Raises:
        DataError: no document at all, or whatever the source raises.
    """
    index = index_source(source, cache_dir)
    everything = np.ones(len(index.hashes), dtype=np.bool_)
    if validation_source is not None:
        other = index_source(validation_source, cache_dir)
        return Split(
            train=_document_set(source, everything, index),
            validation=_document_set(validation_source, np.ones(len(other.hashes), dtype=np.bool_), other),
            digest=hashlib.sha256(f"{index.digest} {other.digest}".encode()).hexdigest(),
        )
    held_out = held_out_mask(index.hashes, validation_fraction)
    if not held_out.any():
        return Split(_document_set(source, everything, index), None, index.digest)
    return Split(_document_set(source, ~held_out, index), _document_set(source, held_out, index), index.digest)


def _document_set(source: Source, chosen: npt.NDArray[np.bool_], index: SourceIndex) -> DocumentSet:
    digest = hashlib.sha256(index.digest.encode() + np.packbits(chosen).tobytes()).hexdigest()
    return DocumentSet(source, chosen, digest, index.identity)


def _changed(where: str, how: str) -> DataError:
    return DataError(f"{where}: the data changed while it was being read ({how}); start the run again")
