"""Validation documents of a stream: chosen by a hash of each document, so that no place and no count matters."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from truthgpt.data.base import Document, IdentifiedSource, Layout, StreamSource
from truthgpt.data.holdout import key_hash
from truthgpt.data.split import DocumentSet, split_documents
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

MAX_DOCUMENTS = 10_000
"""Documents of a stream that validation is looked for in: each start reads them once to check the token cache."""


class NothingHeldOutError(DataError):
    """None of the documents that are looked at is held out."""


def held_out(key: str, fraction: float) -> bool:
    """Whether the document of this key is held out when `fraction` of all documents is.

    The SHA-256 of the key, read as a number in [0, 1), lies below `fraction`: a pure function of both, so a document
    is on the same side in every pass, in every process and wherever it stands.
    """
    return key_hash(key) < fraction * 2**64


class HoldoutSource:
    """The held-out documents among the first `max_documents` of a stream, its shards in the source's own order.

    A piece whose predecessor is not held out is handed out as one that continues nothing. Training skips every
    held-out document, those behind `max_documents` too.

    Args:
        source: the stream.
        fraction: share of its documents that is held out.
        max_documents: documents read at most, held out or not.
    """

    layout: Layout

    def __init__(self, source: StreamSource, fraction: float, max_documents: int = MAX_DOCUMENTS) -> None:
        self.layout = source.layout
        self._source = source
        self._fraction = fraction
        self._max_documents = max_documents

    def documents(self) -> Iterator[Document]:
        """The held-out documents in order.

        Raises:
            NothingHeldOutError: there is none.
            DataError: whatever the stream raises.
        """
        found = False
        chosen_before: int | None = None  # the shard of the document before, if that is held out
        for shard, document in islice(self._in_order(), self._max_documents):
            chosen = held_out(document.key, self._fraction)
            if chosen:
                found, follows = True, chosen_before == shard
                yield replace(document, continues=False) if document.continues and not follows else document
            chosen_before = shard if chosen else None
        if not found:
            raise NothingHeldOutError("no document of the stream is held out any more; start the run again")

    def _in_order(self) -> Iterator[tuple[int, Document]]:
        """Every document, and its shard."""
        for shard in range(len(self._source.shards())):
            for document, _ in self._source.read(shard):
                yield shard, document

    def identity(self) -> str | None:
        """Identity and fingerprint of the stream, and the settings of the choice; None when the stream has none."""
        if not isinstance(self._source, IdentifiedSource):
            return None
        identity = self._source.identity()
        if identity is None:
            return None
        return json.dumps([identity, self._source.fingerprint(), self._fraction, self._max_documents])


def hold_out(
    source: StreamSource, fraction: float, cache_dir: Path | None, max_documents: int = MAX_DOCUMENTS
) -> DocumentSet | None:
    """The validation documents of a stream; None, with a warning, when none is held out.

    Reads the stream once to count them, or not at all when its index is in the cache.

    Args:
        source: the stream.
        fraction: share of its documents that is held out.
        cache_dir: folder of all caches; None: the stream is read at every call.
        max_documents: documents read at most, held out or not.

    Raises:
        DataError: whatever the stream raises.
    """
    if fraction == 0:
        return None
    try:
        return split_documents(HoldoutSource(source, fraction, max_documents), 0.0, None, cache_dir).train
    except NothingHeldOutError:
        logger.warning(
            "none of the first %d documents of the stream is held out at data.validation_fraction %g, so there is no "
            "validation; raise it, or set data.validation_path or data.validation_split",
            max_documents,
            fraction,
        )
        return None
