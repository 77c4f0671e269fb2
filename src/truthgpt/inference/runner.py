"""How tokens get through a model: the engine's side of it, and the runner for models without a paged cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from truthgpt.inference.token_sequence import KeptTokens

Work = Sequence[tuple[KeptTokens, int]]
"""Sequences, and how many of its next tokens each runs through the model."""

_CACHES = ("past_key_values", "cache_params")
"""What transformers' models call a cache: keys and values, or the state of a recurrence."""


class Runner(Protocol):
    """Runs tokens through a model and keeps what later ones need."""

    @property
    def runs_ahead(self) -> bool:
        """Whether `run_ahead` can be used: the device works on its own while the host does something else."""
        ...

    def start(self, sequence: KeptTokens) -> None:
        """Begin to keep `sequence`; `computed` says how much of it is kept already."""
        ...

    def reserve(self, sequence: KeptTokens, tokens: int) -> None:
        """Make room for its next `tokens`. Raises `kv_cache.blocks.OutOfBlocks`, and changes nothing then."""
        ...

    def run(self, work: Work) -> torch.Tensor:
        """Logits `(B, V)` behind the last token that each sequence runs; `computed` grows."""
        ...

    def run_ahead(self, sequences: Sequence[KeptTokens], tokens: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """`run` for one token each, which is on the device only: that of sequence i is `tokens[rows[i]]`."""
        ...

    def fork(self, sequence: KeptTokens, twin: KeptTokens) -> None:
        """Begin to keep `twin`, which has the same tokens as `sequence`, with all that is kept of that one."""
        ...

    def release(self, sequence: KeptTokens) -> None:
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

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt must be run in one pass."""
        ...

    @property
    def shared_tokens(self) -> int:
        """Sequences that begin alike share what is kept of them in pieces of so many tokens, and equal ones all of it,
        by `fork`; 0: they do not."""
        ...


class OneByOneRunner:
    """One sequence at a time, with transformers' own cache, or with none: each token runs all before it again.

    Slow, and right for every causal language model: what the paged cache is measured against, and what stands in for
    it where a model's attention does not go through transformers' interface.
    """

    runs_ahead = False
    positions = 0
    used_positions = 0
    shared_tokens = 0
    whole_prompts = True  # in parts, some recurrent models (Mamba) go on from a wrong state

    def __init__(self, model: PreTrainedModel, use_cache: bool) -> None:
        self._model = model
        self._cache = _cache_name(model) if use_cache else None
        self._logits_to_keep = logits_to_keep(model)

    def start(self, sequence: KeptTokens) -> None:
        """See `Runner`."""
        sequence.computed, sequence.kept = 0, None

    def reserve(self, sequence: KeptTokens, tokens: int) -> None:
        """See `Runner`: there is always room."""

    @torch.no_grad()
    def run(self, work: Work) -> torch.Tensor:
        """See `Runner`."""
        rows = []
        for sequence, count in work:
            end = sequence.computed + count
            begin = 0 if self._cache is None else sequence.computed
            ids = torch.tensor([sequence.tokens[begin:end]], device=self._model.device)
            kept = {} if self._cache is None else {self._cache: sequence.kept}  # None at first: the model makes its own
            output = self._model(input_ids=ids, use_cache=bool(kept), **kept, **self._logits_to_keep(1))
            if self._cache is not None:
                sequence.kept = getattr(output, self._cache)
            sequence.computed = end
            rows.append(output.logits[0, -1])
        return torch.stack(rows)

    def run_ahead(self, sequences: Sequence[KeptTokens], tokens: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """See `Runner`: never."""
        raise NotImplementedError

    def fork(self, sequence: KeptTokens, twin: KeptTokens) -> None:
        """See `Runner`: never."""
        raise NotImplementedError

    def release(self, sequence: KeptTokens) -> None:
        """See `Runner`."""
        sequence.kept = None


@torch.no_grad()
def _cache_name(model: PreTrainedModel) -> str | None:
    """What `model` calls its cache, as seen in what it returns for one token; None: it gives none out."""
    output = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    return next((name for name in _CACHES if getattr(output, name, None) is not None), None)


class _Keep(Protocol):
    def __call__(self, which: int | torch.Tensor) -> dict[str, Any]: ...


def logits_to_keep(model: PreTrainedModel) -> _Keep:
    """Gives the argument with which `model` makes only some logits: the last few, or those at indices; none where its
    forward has no such argument."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return lambda which: {"logits_to_keep": which} if known else {}
