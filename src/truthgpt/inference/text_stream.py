"""Text from tokens while they are being written."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
"""What stands for bytes that are no character, or not yet."""
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 8
"""Tokens kept in front of what is decoded: at least 4, the most a character of UTF-8 can be spread over."""


def continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Text of the new tokens as it stands after the prompt.

    Decoded alone they would lose the space that SentencePiece tokenizers drop at the start of a text.
    """
    before = _decode(tokenizer, prompt_ids)
    whole = _decode(tokenizer, [*prompt_ids, *new_ids])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, new_ids)


class TextStream:
    """The text of one answer, given out as its tokens come.

    What has been given out never changes: an incomplete character waits for its other bytes, and what may be the
    beginning of a stop text waits until it is one or is not. All that `push` and `finish` return, joined, is
    `continuation` of all tokens, ended before the first stop text. First is the one that is complete first; of
    several complete at the same place, the longest. How the tokens are cut into pushes changes nothing.

    A token costs the same wherever it stands: only the last few are decoded again, not the whole text.

    Args:
        tokenizer: decodes; special tokens have no text.
        prompt_ids: what stands before the answer.
        stop: texts that end the answer and are not part of it; none is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._window = _Window(tokenizer, prompt_ids)
        self._stops = [_StopText(text) for text in stop]
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop text came; nothing is given out after that."""
        return self._stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """Take in the next tokens and give out the text that is certain now, often none."""
        return "" if self._stopped else self._scan(self._window.push(token_ids))

    def finish(self) -> str:
        """The answer has ended: give out what was held back, as it stands."""
        if self._stopped:
            return ""
        given = self._scan(self._window.finish())
        if not self._stopped:
            given, self._held = given + self._held, ""
        return given

    def _scan(self, text: str) -> str:
        """Look for the stop texts in certain text; returns what can be given out."""
        if not self._stops:
            return text
        pending = self._held + text
        for place, character in enumerate(text, start=len(self._held) + 1):
            for stop in self._stops:
                stop.take(character)
            complete = [len(stop.text) for stop in self._stops if stop.complete]
            if complete:
                self._stopped = True
                return pending[: place - max(complete)]
        given = len(pending) - max(stop.matched for stop in self._stops)
        self._held = pending[given:]
        return pending[:given]


class _StopText:
    """How much of a stop text the characters so far end with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0]  # of the first n + 1 characters: the longest beginning that is also their end
        for character in text[1:]:
            self._fallback.append(self._next(self._fallback[-1], character))

    @property
    def complete(self) -> bool:
        return self.matched == len(self.text)

    def take(self, character: str) -> None:
        self.matched = self._next(self.matched, character)

    def _next(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._fallback[matched - 1]
        return matched + (self.text[matched] == character)


class _Window:
    """Decodes the last tokens in the context of some before them, and says which of the text is new and certain.

    A decoder's text depends on what precedes in three ways. Bytes of UTF-8 make characters together, over 4 tokens at
    most. The first space of a text is dropped by some. Both are settled by a context of a few tokens that have text.
    And a run of SentencePiece's byte tokens is decoded as a whole, into one replacement character a byte if any of it
    is wrong: such a run is decoded when it has ended, and the context never begins within one that has not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids = self._prompt_context(prompt_ids)
        self._before: str | None = _decode(tokenizer, self._ids)  # None once it is known to stay as it is
        self._new = len(self._ids)  # where the answer begins, while that is not known
        self._given = len(self._before)  # characters of the window that are the prompt's or were given out

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        visible = [index for index in token_ids if self._is_visible(index)]
        self._ids += visible
        if not visible or self._is_byte(visible[-1]):
            return ""
        return self._take(final=False)

    def finish(self) -> str:
        """The rest, as it stands."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        text = _decode(self._tokenizer, self._ids)
        if self._before is not None:
            if not self._settle_beginning(_certain(text, final), final):
                return ""
            text = _decode(self._tokenizer, self._ids)
        certain = _certain(text, final)
        new = certain[self._given :]
        self._given = len(certain)
        if len(self._ids) > 2 * _CONTEXT:
            self._shorten(held=len(text) - self._given)
        return new

    def _settle_beginning(self, certain: str, final: bool) -> bool:
        """Whether the prompt's text stays as it was when tokens follow; where not, the answer is decoded alone.

        It does not when the prompt ends within a character which the answer completes.
        """
        assert self._before is not None
        if not certain.startswith(self._before):
            if self._before.startswith(certain) and not final:
                return False
            self._ids, self._given = self._ids[self._new :], 0
        self._before = None
        return True

    def _shorten(self, held: int) -> None:
        """Forget what the text to come does not depend on."""
        self._ids = self._ids[-_CONTEXT:]
        self._given = len(_decode(self._tokenizer, self._ids)) - held

    def _prompt_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of the prompt, enough for all that follows it to be decoded as after the whole prompt."""
        context: list[int] = []  # last first
        for index in reversed(prompt_ids):
            if not self._is_visible(index):
                continue
            if len(context) >= _CONTEXT and not (self._is_byte(index) and self._is_byte(context[-1])):
                break
            context.append(int(index))
        return context[::-1]

    def _is_visible(self, index: int) -> bool:
        """Whether decoding looks at the token: neither special nor unknown to the tokenizer."""
        return index not in self._special and self._tokenizer.convert_ids_to_tokens(index) is not None

    def _is_byte(self, index: int) -> bool:
        return _BYTE_FALLBACK.fullmatch(self._tokenizer.convert_ids_to_tokens(index)) is not None


def _certain(text: str, final: bool) -> str:
    """Without a last character that more bytes may complete."""
    return text if final else text.removesuffix(_REPLACEMENT)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
