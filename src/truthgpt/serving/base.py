"""What the server needs of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from truthgpt.inference.request import Piece, Sampling


class Load(Protocol):
    """How busy an engine is: requests running and waiting, tokens its cache has room for and holds (0: no cache)."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def cache_tokens(self) -> int: ...

    @property
    def cache_used_tokens(self) -> int: ...


class TextEngine(Protocol):
    """Continues many prompts at once, one token a step; single-threaded."""

    @property
    def model_name(self) -> str: ...

    @property
    def context_tokens(self) -> int | None:
        """Positions the model has; None: no limit is known."""
        ...

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Take a request; returns its id. Raises ConfigError for a prompt that cannot be continued."""
        ...

    def cancel(self, request_id: int) -> None:
        """End a request: its last piece has `finish="cancelled"`. Ids that are unknown or finished are ignored."""
        ...

    def step(self) -> list[Piece]:
        """One forward pass for all running requests; empty when there is no work."""
        ...

    def abandon(self) -> None:
        """Forget all requests, after an error in a step."""
        ...

    @property
    def has_work(self) -> bool: ...

    def load(self) -> Load: ...
