"""Cross-entropy of a linear output head, chunk by chunk: the logits of a batch never exist at once.

The gradients are computed with the loss, while a chunk's logits are at hand, and only scaled in the backward pass, as
in Liger (Hsu et al. 2024, arXiv 2410.10989). What is kept between the two passes has the size of the hidden states and
of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from truthgpt.data.base import IGNORED_LABEL
from truthgpt.runtime.onednn import matmul

CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**25}
"""Size of one chunk's logits. On a GPU large chunks pay: each reads and writes the head's gradient once (1 GB with a
vocabulary of 128k and 2,048 dimensions). On a CPU a chunk should stay near the caches."""
DEFAULT_CHUNK_BYTES = 2**28
VOCAB_MULTIPLE = 64
"""cuBLAS takes slower kernels for rows that do not start at a multiple of 16 bytes, as with GPT-2's 50,257 tokens: on a
GPU the head is padded to a multiple of this many rows, whose logits count nothing."""


@dataclass(frozen=True)
class OutputHead:
    """What stands between the last hidden states `(..., D)` and the logits `(..., V)`.

    `logits = softcap * tanh((hidden @ weight.T + bias) * scale / softcap)`, without the tanh where `softcap` is None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits of `hidden`, in autocast's type where that is on."""
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def linear_cross_entropy(
    hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels that are not -100 (0-d, float32; of float64 inputs float64).

    The products are computed in autocast's type where that is on, all else in float32; the head's gradient is summed
    over the chunks in float32.

    Args:
        hidden: `(N, D)`.
        labels: int64 `(N,)`, from 0 to V - 1 or -100.
        chunk_tokens: rows of logits at a time; None: as many as `CHUNK_BYTES` hold.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if chunk_tokens is None:
        row_bytes = head.weight.shape[0] * (4 if hidden.device.type == "cpu" else dtype.itemsize)
        chunk_tokens = max(1, CHUNK_BYTES.get(hidden.device.type, DEFAULT_CHUNK_BYTES) // row_bytes)
    # Chunks of equal size: the last one of a division that leaves a rest would be too small for its product's kernel.
    chunks = max(1, math.ceil(hidden.shape[0] / chunk_tokens))
    chunk_tokens = math.ceil(hidden.shape[0] / chunks)
    settings = _Settings(dtype, chunk_tokens, head.scale, head.softcap, torch.is_grad_enabled())
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, labels, settings)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype
    chunk_tokens: int
    scale: float
    softcap: float | None
    grad_enabled: bool
    """Whether a backward pass may follow; inside an autograd function that can no longer be asked."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        settings: _Settings,
    ) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            needed = [settings.grad_enabled and wanted for wanted in ctx.needs_input_grad[:3]]
            gradients = _Gradients(hidden, weight, bias, needed)
            head = _padded(weight, settings.dtype)
            losses = torch.empty(hidden.shape[0], dtype=_summed_in(settings.dtype), device=hidden.device)
            for start in range(0, hidden.shape[0], settings.chunk_tokens):
                rows = slice(start, start + settings.chunk_tokens)
                inputs = hidden[rows].to(settings.dtype)
                logits = matmul(inputs, head.T)
                if bias is not None:
                    logits[:, : bias.shape[0]] += bias
                losses[rows], logits = _losses(logits, labels[rows], weight.shape[0], settings, gradients.wanted)
                if gradients.wanted:
                    gradients.add(rows, inputs, head, logits)
                del logits  # or the next chunk's would be made beside it
        ctx.save_for_backward(*gradients.finished())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        (scale,) = outputs
        # In float32: a half-precision product would round the factor itself, for all gradients alike.
        scaled = [g if g is None else g.copy_(g.to(_summed_in(g.dtype)).mul_(scale)) for g in ctx.saved_tensors]
        return (*scaled, None, None)


class _Gradients:
    """The gradients of hidden states, head and bias, filled chunk by chunk; None for those nobody needs."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: Sequence[bool]
    ) -> None:
        self.wanted = any(needed)
        self._dtype, self._rows = weight.dtype, weight.shape[0]
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        # Made by the first chunk: one chunk alone needs no sum.
        self._weight: torch.Tensor | None = None
        self._needs_weight = needed[1]
        self._bias = torch.zeros_like(bias, dtype=_summed_in(bias.dtype)) if bias is not None and needed[2] else None

    def add(self, rows: slice, inputs: torch.Tensor, head: torch.Tensor, logits: torch.Tensor) -> None:
        """Take in one chunk: its inputs `(n, D)`, the head `(V, D)` and the gradient of its logits `(n, V)`."""
        if self._hidden is not None:
            self._hidden[rows] = matmul(logits, head)
        if self._needs_weight:
            self._weight = _sum_product(self._weight, logits.T, inputs)
        if self._bias is not None:
            self._bias += logits[:, : self._bias.shape[0]].sum(dim=0, dtype=self._bias.dtype)

    def finished(self) -> tuple[torch.Tensor | None, ...]:
        """In the types and sizes of the tensors they belong to."""
        weight = None if self._weight is None else self._weight[: self._rows].to(self._dtype)
        return self._hidden, weight, None if self._bias is None else self._bias.to(self._dtype)


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """float32, save for float64."""
    return torch.promote_types(dtype, torch.float32)


def _sum_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right` in float32, in place where there is a total."""
    if not left.is_cuda or left.dtype == _summed_in(left.dtype):
        product = matmul(left, right).to(_summed_in(left.dtype))
        return product if total is None else total.add_(product)
    # The products of half-precision matrices are summed up in float32 inside the kernel and not rounded in between.
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _padded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The head `(V, D)` in `dtype`; on a GPU in half precision with rows of zeros up to a multiple that is fast."""
    missing = -weight.shape[0] % VOCAB_MULTIPLE
    if not missing or not weight.is_cuda or dtype == torch.float32:
        return weight.to(dtype)
    padded = torch.empty(weight.shape[0] + missing, weight.shape[1], dtype=dtype, device=weight.device)
    padded[: weight.shape[0]] = weight
    padded[weight.shape[0] :].zero_()
    return padded


def _losses(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, settings: _Settings, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every row `(n,)` in float32, and the gradient of its sum by the products `(n, V)` in their own type."""
    if logits.is_cuda:
        from truthgpt.models.cross_entropy_kernel import cross_entropy_

        return cross_entropy_(logits, labels, vocab_size, settings.scale, settings.softcap, with_gradient), logits
    # As few passes as there can be: on a CPU this is a third of a small model's step.
    values, slope = logits.to(_summed_in(logits.dtype)), None
    if settings.scale != 1.0:
        values = values * settings.scale
    if settings.softcap is not None:
        slope = torch.tanh(values / settings.softcap)
        values = slope * settings.softcap
    ignored = labels == IGNORED_LABEL
    index = labels.clamp_min(0).unsqueeze(-1)
    target, largest = values.gather(-1, index).squeeze(-1), values.amax(dim=-1)
    # Twice as fast as log_softmax and its exponential. In place on a CPU, where memory that is new for every chunk
    # costs more than the arithmetic; elsewhere an output that is the input is not known to be safe.
    gradient = torch.softmax(values, dim=-1, out=values if values.device.type == "cpu" else None)
    # The log of the sum of exponentials, from the largest probability, which is never too small for its log.
    losses = largest - gradient.amax(dim=-1).log_() - target
    losses.masked_fill_(ignored, 0.0)
    if not with_gradient:
        return losses, logits
    gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
    gradient.index_fill_(0, ignored.nonzero().squeeze(-1), 0.0)
    if settings.scale != 1.0:
        gradient *= settings.scale
    if slope is not None:
        gradient *= 1 - slope.square()
    return losses, gradient.to(logits.dtype)
