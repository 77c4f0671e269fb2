"""Probes of the first minute: does this model, with this attention, compute what it should?

A model may need a mask that an attention function without one does not know of, may ignore the borders of packed
documents without a word, and may see the tokens that it is to predict. All are seen by comparing logits, on the model
itself and at a length that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from truthgpt.attention.base import packed_arguments
from truthgpt.attention.install import transformers_attention_in
from truthgpt.runtime.precision import in_float32

TOLERANCE = 1e-4
"""Largest difference of float32 logits, relative to the largest logit, that is put down to rounding."""
LEAK_TOLERANCE = 1e-6
"""The same where nothing but a leak can make a difference: in one document, when another is exchanged, and in the
tokens before those that are."""
HALF_TOLERANCE = 0.05
"""Both in half precision. Small models of five families stay below 0.006 there, and are off by 0.04 to 1.3 (one of the
two errors by 0.14 at least) when borders are ignored."""


PROBE_TOKENS = 1024
"""Tokens of a probe, unless the model looks back further: its logits take 4 bytes times the vocabulary each."""
CAUSAL_PROBE_TOKENS = 16
"""Where tokens see those after them, a few show it: random models of 17 such families by 3e-4 and more, and 140 causal
ones stay below 3e-7."""
_REACHES = ("sliding_window", "attention_chunk_size")
"""Settings of transformers' models that say how far some of their layers look back."""


@dataclass(frozen=True)
class PackedErrors:
    """Largest differences of logits, relative to the largest logit.

    `leak`: the second document when the first is exchanged; `separate`: both documents packed, against each alone.
    """

    leak: float
    separate: float

    def exceeded(self, half_precision: bool = False) -> bool:
        """Whether the documents are not kept apart."""
        leak, separate = (HALF_TOLERANCE,) * 2 if half_precision else (LEAK_TOLERANCE, TOLERANCE)
        return not (self.leak <= leak and self.separate <= separate)  # NaN too is exceeded


def probe_length(model: PreTrainedModel, seq_len: int) -> int:
    """Tokens that show what a row of `seq_len` would: three times as many as any layer with a limit looks back."""
    config = model.config.get_text_config()
    reaches = [getattr(config, name, None) for name in _REACHES]
    return min(seq_len, max(PROBE_TOKENS, *(3 * reach for reach in reaches if isinstance(reach, int)), 0))


def dense_error(model: PreTrainedModel, seq_len: int) -> float:
    """Largest difference between the model's attention and transformers' own, on one dense row of `seq_len` tokens or
    as many as are needed."""
    ids = _random_ids(model, probe_length(model, seq_len), seed=0)
    with _quiet(model):
        ours = model(input_ids=ids, use_cache=False).logits
        with transformers_attention_in(model):
            reference = model(input_ids=ids, use_cache=False).logits
        return _relative(ours, reference)


def future_error(model: PreTrainedModel) -> float:
    """How far a model sees the tokens that it is to predict: largest difference of the logits of a row's first half,
    relative to the largest logit, when the second half is exchanged."""
    ids, half = _random_ids(model, CAUSAL_PROBE_TOKENS, seed=0), CAUSAL_PROBE_TOKENS // 2
    other = torch.cat([ids[:, :half], _random_ids(model, CAUSAL_PROBE_TOKENS - half, seed=1)], dim=1)
    with _quiet(model):
        before, after = (model(input_ids=row, use_cache=False).logits[:, :half] for row in (ids, other))
        return _relative(after, before)


def packed_errors(model: PreTrainedModel, seq_len: int) -> PackedErrors:
    """How far packed documents see each other, on a row of `seq_len` tokens, or as many as are needed, that holds two.

    The second is twice as long as the first, so that it is longer than any sliding window that matters.

    Raises:
        TypeError: the model's forward takes no packed arguments.
    """
    length = probe_length(model, seq_len)
    first = max(1, length // 3)
    ids, other = _random_ids(model, length, seed=1), _random_ids(model, first, seed=2)
    with _quiet(model):
        packed = _packed_logits(model, ids, first)
        exchanged = _packed_logits(model, torch.cat([other, ids[:, first:]], dim=1), first)
        parts = torch.split(ids, [first, length - first], dim=1)
        alone = [model(input_ids=part, use_cache=False).logits for part in parts]
        return PackedErrors(
            leak=_relative(exchanged[:, first:], packed[:, first:]), separate=_relative(packed, torch.cat(alone, dim=1))
        )


def _packed_logits(model: PreTrainedModel, ids: torch.Tensor, border: int) -> torch.Tensor:
    length = ids.shape[1]
    positions = torch.cat([torch.arange(border), torch.arange(length - border)]).unsqueeze(0).to(ids.device)
    borders = torch.tensor([0, border, length, length], dtype=torch.int32, device=ids.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **packed_arguments(positions, borders)).logits
    return logits


def _random_ids(model: PreTrainedModel, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocab_size = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocab_size, (1, length), generator=generator).to(model.device)


def _relative(values: torch.Tensor, reference: torch.Tensor) -> float:
    largest = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((values - reference).abs().max() / largest)


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, no gradients, float32 weights and products in full precision; everything as before afterwards."""
    training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), in_float32(model):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(training)
