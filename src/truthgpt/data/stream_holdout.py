"""Validation documents of a stream: chosen by a hash of each document, so that no place and no count matters."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace

from truthgpt.data.base import Document, IdentifiedSource, Layout, StreamSource
from truthgpt.data.holdout import key_hash

logger = logging.getLogger(__name__)

MAX_DOCUMENTS = 10_000
"""Documents of a stream that validation is looked for in: each start reads them once to check the token cache."""


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
            DataError: whatever the stream raises.
        """
        left = self._max_documents
        for shard in range(len(self._source.shards())):
            follows = False
            for document, _ in self._source.read(shard):
                chosen = held_out(document.key, self._fraction)
                if chosen:
                    yield replace(document, continues=False) if document.continues and not follows else document
                follows = chosen
                left -= 1
                if left == 0:
                    return

    def identity(self) -> str | None:
        """Identity and fingerprint of the stream, and the settings of the choice; None when the stream has none."""
        if not isinstance(self._source, IdentifiedSource):
            return None
        identity = self._source.identity()
        if identity is None:
            return None
        return json.dumps([identity, self._source.fingerprint(), self._fraction, self._max_documents])


def hold_out(source: StreamSource, fraction: float, max_documents: int = MAX_DOCUMENTS) -> HoldoutSource | None:
    """The validation documents of a stream; None, with a warning, when none is held out.

    Reads the stream up to the first document that is held out.

    Raises:
        DataError: whatever the stream raises.
    """
    if fraction == 0:
        return None
    holdout = HoldoutSource(source, fraction, max_documents)
    if next(holdout.documents(), None) is not None:
        return holdout
    logger.warning(
        "none of the first %d documents of the stream is held out at data.validation_fraction %g, so there is no "
        "validation; raise it, or set data.validation_path or data.validation_split",
        max_documents,
        fraction,
    )
    return None
