"""Documents to token ids, in batches of bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import Document
from truthgpt.data.chat import ChatRenderer, RenderedChat
from truthgpt.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

ENCODING_VERSION = 2
"""Part of every digest: a change of how documents become tokens raises it."""
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
    """Ids of a piece of a document, int64 `(tokens,)`, and which of them the loss counts: all, none, or a mask.

    `opens` says that a document begins here, its ids then start with the frame's prefix unless the text brings its
    own; `document` counts the documents taken so far, this one included. `end` are the trained ids that close the
    document; whoever joins runs puts those of the last one behind it. It is empty there when the document closes
    itself. `problems` stand on the last run of a document: `double_bos`, the text began with the begin-of-text token
    the tokenizer adds anyway (one is kept); `double_eos`, it ended with the end-of-text token (`end` is empty);
    `missing_eos`, the chat template left the last answer without an end-of-text token (`end` holds it).
    """

    ids: npt.NDArray[np.int64]
    trained: bool | npt.NDArray[np.bool_]
    opens: bool
    document: int
    end: tuple[int, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    text: str
    trained: bool
    opens: bool
    closes: bool
    document: int
    where: str
    chat: RenderedChat | None = None


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


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides how the tokenizer cuts text (its `tokenizer.json`)."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


class DocumentEncoder:
    """Turns documents into token ids; conversations through the chat template.

    A forked process may use it at once: it then tokenises on one thread, for the threads of the tokenizers library do
    not survive a fork.

    Args:
        tokenizer: a fast tokenizer with an end-of-text token.
        vocab_size: number of the model's token ids; a larger id is refused.
        chat_template: Jinja template of conversations; None: the tokenizer's own.

    Raises:
        ConfigError: a `chat_template` that is no Jinja template.
        DataError: an unusable tokenizer (see `special_frame`), or one whose framing ids the model does not have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, chat_template: str | None = None) -> None:
        self.frame = special_frame(tokenizer)
        """Ids around every document."""
        self.vocab_size = vocab_size
        """Number of token ids of the model."""
        self._tokenizer = tokenizer
        self._prefix = np.array(self.frame.prefix, dtype=np.int64)
        self._renderer = ChatRenderer(tokenizer, chat_template)
        self._process = os.getpid()
        self._check(np.array([*self.frame.prefix, self.frame.end_of_text]), where="")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides which tokens a document becomes: tokenizer, frame and chat template."""
        parts = [ENCODING_VERSION, tokenizer_digest(self._tokenizer), repr(self.frame), self._renderer.identity]
        if self._inner_backend is not None:
            parts.append("no space is put in front of a piece that goes on")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def runs(self, documents: Iterable[Document]) -> Iterator[TokenRun]:
        """Ids of all documents in order; memory is bounded by a batch, or by the longest conversation.

        Raises:
            ConfigError: a conversation, and no usable chat template.
            DataError: a token id the model does not have, or a conversation the template cannot render or whose
                answers cannot be found in it; with the document.
        """
        # Unset, the library would warn in every process forked later; switched on, it would hang there.
        if os.getpid() == self._process:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        problems: tuple[str, ...] = ()
        ended = False  # whether the last token so far is the end-of-text token, written in the document's own text
        for batch in _batches(self._pieces(documents)):
            for piece, encoding in zip(batch, self._encode(batch), strict=True):
                run = self._run(piece, encoding)
                if encoding.ids:
                    ended = self._is_ended(run) and piece.chat is None
                if piece.closes and ended:
                    run = replace(run, end=(), problems=(*run.problems, "double_eos"))
                problems += run.problems
                reported = problems if piece.closes else ()
                yield run if run.problems == reported else replace(run, problems=reported)
                if piece.closes:
                    problems, ended = (), False

    def _pieces(self, documents: Iterable[Document]) -> Iterator[_Piece]:
        for number, document in enumerate(documents, start=1):
            opens = not document.continues
            if document.conversation is not None:
                chat = self._renderer.render(document.conversation, document.where)
                yield _Piece(chat.text, True, opens, True, number, document.where, chat)
                continue
            # An empty segment in front would hide a begin-of-text token that the text brings itself.
            segments = [segment for segment in document.segments if segment.text] or document.segments[-1:]
            for place, segment in enumerate(segments, start=1):
                for text, last in _cut(segment.text):
                    closes = last and place == len(segments)
                    yield _Piece(text, segment.trained, opens, closes, number, document.where)
                    opens = False

    def _encode(self, batch: list[_Piece]) -> list[Encoding]:
        texts = [piece.text for piece in batch]
        if any(piece.chat is not None for piece in batch):
            return list(self._offset_backend.encode_batch(texts, add_special_tokens=False))
        whole = self._tokenizer.backend_tokenizer
        by_place = {True: whole, False: self._inner_backend or whole}  # whether the piece opens its document
        # Without offsets: 2.4 s against 3.9 s through `tokenizer(texts)` for 9.5 MB on two cores, the same ids.
        found = {
            opens: iter(
                backend.encode_batch_fast([p.text for p in batch if p.opens is opens], add_special_tokens=False)
            )
            for opens, backend in by_place.items()
        }
        return [next(found[piece.opens]) for piece in batch]

    @cached_property
    def _inner_backend(self) -> Tokenizer | None:
        """What cuts a piece that goes on inside its document; None: the tokenizer itself does.

        Many put a space in front of any text they are given (Llama 2, Mistral, Phi-3): in front of a completion it
        would be trained, and in generation nothing stands between the prompt and what is written behind it.
        """
        from tokenizers import Tokenizer

        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        normalizer = _without_space_in_front(settings["normalizer"])
        pre_tokenizer = _without_space_in_front(settings["pre_tokenizer"])
        if (normalizer, pre_tokenizer) == (settings["normalizer"], settings["pre_tokenizer"]):
            return None
        return Tokenizer.from_str(json.dumps({**settings, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))

    @cached_property
    def _offset_backend(self) -> Tokenizer:
        """The tokenizer without its post-processor, which may trim the space off a token's offsets (Llama 3's does)."""
        from tokenizers import Tokenizer

        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**settings, "post_processor": None}))

    def _run(self, piece: _Piece, encoding: Encoding) -> TokenRun:
        """One piece, framed; `problems` are those seen in it."""
        tokens = encoding.ids
        ids = np.array(tokens, dtype=np.int64)
        self._check(ids, piece.where)
        own_prefix = piece.opens and tuple(tokens[: self._prefix.size]) == self.frame.prefix
        framed = piece.opens and not own_prefix
        trained: bool | npt.NDArray[np.bool_] = piece.trained
        end: tuple[int, ...] = (self.frame.end_of_text,)
        problems: tuple[str, ...] = ("double_bos",) if own_prefix and self._prefix.size else ()
        if piece.chat is not None:
            # A template that writes the begin-of-text token is as it should be.
            trained, end = self._chat_labels(piece.chat, ids, encoding, framed)
            problems = ("missing_eos",) if end else ()
        if framed:
            ids = np.concatenate([self._prefix, ids])
        return TokenRun(ids, trained, piece.opens, piece.document, end, problems)

    def _is_ended(self, run: TokenRun) -> bool:
        """Whether the text of a run with tokens ends with the end-of-text token.

        Where that is the begin-of-text token too, one that stands alone in front of the text begins it.
        """
        text = run.ids[self._prefix.size :] if run.opens else run.ids
        return text.size > 0 and int(text[-1]) == self.frame.end_of_text

    def _chat_labels(
        self, chat: RenderedChat, ids: npt.NDArray[np.int64], encoding: Encoding, framed: bool
    ) -> tuple[bool | npt.NDArray[np.bool_], tuple[int, ...]]:
        """Which tokens of a conversation the loss counts, its prefix included, and what still closes it."""
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        ends_behind = offsets[:, 1] >= (chat.answered_at or 0)
        closed = chat.answered_at is None or bool(np.any((ids == self.frame.end_of_text) & ends_behind))
        end = () if closed else (self.frame.end_of_text,)
        if chat.spans is not None:
            prefix, trained = False, _tokens_inside(offsets, chat.spans)
        elif chat.untrained:
            prefix, trained = True, ~_tokens_inside(offsets, chat.untrained)
        else:
            return True, end
        return (np.concatenate([np.full(self._prefix.size, prefix), trained]) if framed else trained), end

    def _check(self, ids: npt.NDArray[np.int64], where: str) -> None:
        if ids.size and int(ids.max()) >= self.vocab_size:
            worst = int(ids.max())
            place = f"{where}: " if where else ""
            raise DataError(
                f"{place}the tokenizer gives token id {worst} ({self._tokenizer.convert_ids_to_tokens(worst)!r}), the "
                f"model has ids 0 to {self.vocab_size - 1}; use the model's own tokenizer, or a model with "
                f"model.config.vocab_size of at least {len(self._tokenizer)}"
            )


def group_documents(
    runs: Iterable[TokenRun],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], bool]]:
    """Whole documents of `runs`: ids `(tokens,)`, which of them are trained `(tokens,)`, and whether it opens.

    The closing ids stand behind each document, unless the next one continues it.
    """
    parts: list[TokenRun] = []
    for run in runs:
        if parts and run.document != parts[0].document:
            yield _joined(parts, closed=run.opens)
            parts = []
        parts.append(run)
    if parts:
        yield _joined(parts, closed=True)


def _joined(parts: list[TokenRun], closed: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], bool]:
    end = np.array(parts[-1].end if closed else (), dtype=np.int64)
    masks = [np.broadcast_to(np.asarray(part.trained, dtype=np.bool_), part.ids.shape) for part in parts]
    ids = np.concatenate([*(part.ids for part in parts), end])
    return ids, np.concatenate([*masks, np.ones(end.size, dtype=np.bool_)]), parts[0].opens


def _without_space_in_front(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step of a `tokenizer.json`, or a sequence of them, that begins no text with a space of its own."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel" and "add_prefix_space" in step:
        return {**step, "add_prefix_space": False}
    if step["type"] != "Sequence":
        return step
    name = "normalizers" if "normalizers" in step else "pretokenizers"
    return {**step, name: [kept for kept in map(_without_space_in_front, step[name]) if kept is not None]}


def _tokens_inside(offsets: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Tokens with at least one character in a span.

    A token that straddles a border is trained: else the first word of an answer would be lost wherever the space
    before it is part of its token. The space that a SentencePiece model invents counts as the character behind it.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        inside |= (starts < end) & (ends > start)
    return inside


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `PIECE_CHARACTERS`, each ending behind a line end where there is one; True with the last."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end], False
        start = end
    yield text[start:], True


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
