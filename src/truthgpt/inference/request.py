"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from truthgpt.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "error"]

LEAST_PENALTY = 1e-3
"""Of a repetition: beyond it, and beyond its inverse, logits overflow, which reads as a model that is broken."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    Args:
        max_new_tokens: tokens to write at most, 1 or more.
        temperature: logits are divided by it; 0 is greedy.
        top_k: sample from the k likeliest tokens only; 0: from all.
        top_p: sample from the fewest likeliest tokens whose probabilities sum up to this (Holtzman 2020); 1: from all.
        repetition_penalty: logits of tokens that are in the text already are divided by it where positive, multiplied
            where negative (Keskar 2019), 0.001 to 1000; 1: none.
        seed: seed of the request's own random numbers: token n depends on it, n and the logits alone.
        stop: texts that end the answer; they are not part of it.
        stop_ids: special tokens that end the answer, besides those that end every text of the model.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, allowed, found in (
            ("max_new_tokens", "1 or more", self.max_new_tokens >= 1),
            ("temperature", "0 (greedy) or more", math.isfinite(self.temperature) and self.temperature >= 0),
            ("top_k", "0 (all tokens) or more", self.top_k >= 0),
            ("top_p", "more than 0, at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "0.001 to 1000", LEAST_PENALTY <= self.repetition_penalty <= 1 / LEAST_PENALTY),
            ("stop", "texts that are not empty", all(self.stop)),
        ):
            if not found:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not allowed: give {allowed}")


@dataclass(frozen=True)
class Piece:
    """What a request has got in one step of the engine.

    Attributes:
        request_id: what `Engine.submit` returned.
        token_ids: the new tokens; an end-of-text token is among them.
        text: their text as far as its characters are complete, without stop texts. The pieces' texts joined are the
            whole answer.
        finish: why this is the last piece: `stop` (an end-of-text token or a stop text), `length`, `cancelled`,
            `error` (the model's logits are not finite); None: more will come.
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason | None

    def after(self, before: Piece) -> Piece:
        """Both of them, as one."""
        return Piece(self.request_id, before.token_ids + self.token_ids, before.text + self.text, self.finish)
