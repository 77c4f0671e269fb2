"""Documents to token ids, in batches of bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Document
from truthgpt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 2**19
"""Text handed to the tokenizer at once: an encoding costs about 90 bytes a token until its ids are taken out."""
BATCH_PIECES = 4096
PIECE_CHARACTERS = 2**16
"""A longer text is cut behind a line end before it is tokenised, so that one huge document costs no huge memory."""


@dataclass(frozen=True)
class SpecialFrame:
    """Ids around every document: what the tokenizer itself puts in front, and the end-of-text token behind."""

    prefix: tuple[int, ...]
    end_of_text: int


@dataclass(frozen=True)
class TokenRun:
    """Ids of a piece of a segment, `(tokens,)`, and whether the loss counts them.

    `opens` says that a document begins here; `document` counts the documents taken so far, this one included.
    """

    ids: npt.NDArray[np.int64]
    trained: bool
    opens: bool
    document: int


@dataclass(frozen=True)
class _Piece:
    text: str
    trained: bool
    opens: bool
    document: int
    where: str


def special_frame(tokenizer: PreTrainedTokenizerFast) -> SpecialFrame:
    """How the tokenizer frames a text, found by asking it.

    `prefix + ids of the bare text` is then what `tokenizer(text)` gives, less anything it puts behind the text, so that
    a prompt is seen in generation as it was in training. Also clears any truncation or padding left switched on.

    Raises:
        DataError: it has no end-of-text token, is not a fast tokenizer, or puts special tokens inside a text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer has no fast version (tokenizers library); use one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; set its eos_token, it closes every document")
    framed = list(tokenizer("a").input_ids)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    starts = [start for start in range(len(framed)) if framed[start : start + len(bare)] == bare]
    if not starts:
        raise DataError("the tokenizer puts special tokens inside a text; a causal language model cannot be trained so")
    return SpecialFrame(tuple(framed[: starts[0]]), int(tokenizer.eos_token_id))


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Iterator[TokenRun]:
    """Ids of all documents in order, without the special frame; memory is bounded by a batch.

    Raises:
        DataError: a token id of `vocab_size` or more, with its document.
    """
    # Set, it keeps the library from warning in every loader process forked later, none of which tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = tokenizer.backend_tokenizer
    for batch in _batches(_pieces(documents)):
        # Without offsets: 2.4 s against 3.9 s through `tokenizer(texts)` for 9.5 MB on two cores, the same ids.
        encodings = backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            if ids.size and int(ids.max()) >= vocab_size:
                worst = int(ids.max())
                token = tokenizer.convert_ids_to_tokens(worst)
                raise DataError(
                    f"{piece.where}: the tokenizer gives token id {worst} ({token!r}), the model has ids 0 to "
                    f"{vocab_size - 1}; use the model's own tokenizer, or a model with model.config.vocab_size of at "
                    f"least {len(tokenizer)}"
                )
            yield TokenRun(ids, piece.trained, piece.opens, piece.document)


def _pieces(documents: Iterable[Document]) -> Iterator[_Piece]:
    for number, document in enumerate(documents, start=1):
        opens = not document.continues
        for segment in document.segments:
            for text in _cut(segment.text):
                yield _Piece(text, segment.trained, opens, number, document.where)
                opens = False


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most `PIECE_CHARACTERS`, each ending behind a line end where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
