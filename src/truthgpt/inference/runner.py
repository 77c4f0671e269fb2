"""How tokens get through a model: the engine's side of it, and the runner for models without a paged cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from truthgpt.inference.token_sequence import TokenSequence

Work = Sequence[tuple[TokenSequence, int]]
"""Sequences, and how many of its next tokens each runs through the model."""


class Runner(Protocol):
    """Runs tokens through a model and keeps what later ones need."""

    def start(self, sequence: TokenSequence) -> None:
        """Begin to keep `sequence`; `computed` says how much of it is kept already."""
        ...

    def reserve(self, sequence: TokenSequence, tokens: int) -> None:
        """Make room for its next `tokens`. Raises `kv_cache.blocks.OutOfBlocks`, and changes nothing then."""
        ...

    def run(self, work: Work) -> torch.Tensor:
        """Logits `(B, V)` behind the last token that each sequence runs; `computed` grows."""
        ...

    def release(self, sequence: TokenSequence) -> None:
        """Keep nothing of it any more."""
        ...

    @property
    def positions(self) -> int:
        """Positions the cache has in all; 0: it has no limit of its own."""
        ...

    @property
    def used_positions(self) -> int:
        """Positions of the cache that sequences hold."""
        ...


class OneByOneRunner:
    """One sequence at a time, with transformers' own cache, or with none: each token runs all before it again.

    Slow, and right for every causal language model: what the paged cache is measured against, and what stands in for
    it where a model's attention does not go through transformers' interface.
    """

    positions = 0
    used_positions = 0

    def __init__(self, model: PreTrainedModel, use_cache: bool) -> None:
        self._model = model
        self._use_cache = use_cache
        self._logits_to_keep = logits_to_keep(model)

    def start(self, sequence: TokenSequence) -> None:
        """See `Runner`."""
        sequence.computed = 0
        sequence.kept = DynamicCache(config=self._model.config) if self._use_cache else None

    def reserve(self, sequence: TokenSequence, tokens: int) -> None:
        """See `Runner`: there is always room."""

    @torch.no_grad()
    def run(self, work: Work) -> torch.Tensor:
        """See `Runner`."""
        rows = []
        for sequence, count in work:
            end = sequence.computed + count
            begin = sequence.computed if self._use_cache else 0
            ids = torch.tensor([sequence.tokens[begin:end]], device=self._model.device)
            cache = {"past_key_values": sequence.kept} if self._use_cache else {}
            output = self._model(input_ids=ids, use_cache=self._use_cache, **cache, **self._logits_to_keep(1))
            sequence.kept = output.past_key_values if self._use_cache else None  # some families make their own kind
            sequence.computed = end
            rows.append(output.logits[0, -1])
        return torch.stack(rows)

    def release(self, sequence: TokenSequence) -> None:
        """See `Runner`."""
        sequence.kept = None


class _Keep(Protocol):
    def __call__(self, which: int | torch.Tensor) -> dict[str, Any]: ...


def logits_to_keep(model: PreTrainedModel) -> _Keep:
    """Gives the argument with which `model` makes only some logits: the last few, or those at indices; none where its
    forward has no such argument."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return lambda which: {"logits_to_keep": which} if known else {}
