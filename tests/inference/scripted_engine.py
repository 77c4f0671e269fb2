"""An engine that says what it was told to, a token a step, and remembers what it was asked."""

from __future__ import annotations

import time
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from truthgpt.errors import ConfigError
from truthgpt.inference.request import FinishReason, Piece, Sampling


class ScriptedEngine:
    """Answers the requests in turn with `answers`, each ended by an end-of-text token unless it is cut short.

    Args:
        wait_s: what a step takes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        answers: Sequence[str],
        context_tokens: int | None = None,
        wait_s: float = 0.0,
    ) -> None:
        self.context_tokens = context_tokens
        self.asked: list[tuple[list[int], Sampling]] = []
        self.cancelled: list[int] = []
        self._tokenizer = tokenizer
        self._answers = answers
        self._wait_s = wait_s
        self._left: list[int] | None = None
        self._broken_off = False

    @property
    def has_work(self) -> bool:
        """Whether an answer is being written."""
        return self._left is not None

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Begin the next answer."""
        assert self._left is None, "one conversation asks one question at a time"
        if self.context_tokens is not None and len(prompt_ids) > self.context_tokens:
            raise ConfigError("the prompt is longer than the context")
        text = self._answers[len(self.asked) % len(self._answers)]
        self._left = [*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id][: sampling.max_new_tokens]
        self._broken_off = False
        self.asked.append((list(prompt_ids), sampling))
        return len(self.asked) - 1

    def cancel(self, request_id: int) -> None:
        """End the present answer with the next step."""
        if self._left is not None and request_id == len(self.asked) - 1:
            self._broken_off = True
            self.cancelled.append(request_id)

    def step(self) -> list[Piece]:
        """One token."""
        time.sleep(self._wait_s)
        request = len(self.asked) - 1
        if self._left is None:
            return []
        if self._broken_off:
            self._left = None
            return [Piece(request, (), "", "cancelled")]
        token = self._left.pop(0)
        finish: FinishReason | None = None if self._left else "length"
        if token == self._tokenizer.eos_token_id or token in self.asked[-1][1].stop_ids:
            finish = "stop"
        if finish is not None:
            self._left = None
        return [Piece(request, (token,), self._tokenizer.decode([token], skip_special_tokens=True), finish)]
