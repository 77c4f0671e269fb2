"""Tokens that a runner keeps, and a request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from truthgpt.inference.request import FinishReason, Sampling
from truthgpt.inference.text_stream import TextStream


@dataclass(eq=False)
class KeptTokens:
    """Tokens that run through a model, in parts.

    Attributes:
        computed: those whose keys and values are kept; the rest is run through the model next.
        kept: what the runner keeps for them.
    """

    tokens: list[int]
    computed: int = field(default=0, init=False)
    kept: Any = field(default=None, init=False)

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be chosen."""
        return len(self.tokens) - self.computed


@dataclass(eq=False)
class TokenSequence(KeptTokens):
    """The tokens of a prompt and of its answer so far.

    Attributes:
        tokens: prompt and answer.
        prompt_tokens: how many of them are the prompt.
        limit: new tokens at most: those asked for, or what the model's context has room for.
        running: it was admitted.
    """

    request_id: int
    sampling: Sampling
    prompt_tokens: int
    limit: int
    stream: TextStream
    running: bool = False
    cancelled: bool = False

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    def finish_reason(self, stop_ids: frozenset[int]) -> FinishReason | None:
        """Why the answer ends with its last token; None: it goes on."""
        last = self.tokens[-1]
        if self.stream.stopped or last in stop_ids or last in self.sampling.stop_ids:
            return "stop"
        return "length" if self.written >= self.limit else None
