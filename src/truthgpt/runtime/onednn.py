"""Matrix products of float32 on an AMD processor by oneDNN's kernels.

PyTorch hands them to MKL, which does not use all of that processor's vector units; oneDNN, which is part of PyTorch
too, does. On Intel's processors both take the same time, and nothing changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from truthgpt.runtime.device import is_amd_processor

PACKED_FOR_ROWS = 8
"""A packed weight is laid out for so many rows; for others it is no worse."""


@cache
def is_faster() -> bool:
    """Whether this processor multiplies faster so. PyTorch's operators are internal ones, so they are tried."""
    backends = torch.backends
    if not (is_amd_processor() and backends.mkl.is_available() and backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    with _disable_current_modes():  # it may be asked first while a step is counted on tensors without storage
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(3, 24, generator=generator), torch.randn(40, 24, generator=generator)
        try:
            found = linear(x, weight), linear(x, pack(weight))
        except (AttributeError, RuntimeError, TypeError):
            return False
        return all(torch.allclose(each, F.linear(x, weight), atol=1e-5) for each in found)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` without gradients: `(..., in)`, `(out, in)` or such a packed weight, `(out,)`."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `(out, in)` that lies as the kernels for a few rows read it; only `linear` can use it."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight, PACKED_FOR_ROWS)
    return packed


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of two matrices, without gradients: float32 on a CPU by the kernels that are faster."""
    if left.device.type == "cpu" and left.dtype == torch.float32 and left.numel() and right.numel() and is_faster():
        return linear(left, right.t())
    return left @ right


class OneDnnLinear(nn.Linear):
    """nn.Linear, multiplied by oneDNN forward and backward where it computes in float32 on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`."""
        return _multiplied(input, self.weight, self.bias) if _fits(input, self.weight) else super().forward(input)


class OneDnnConv1D(Conv1D):  # type: ignore[misc, unused-ignore]
    """The same of transformers' Conv1D, whose weight is `(in, out)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`."""
        return _multiplied(x, self.weight.t(), self.bias) if _fits(x, self.weight) else super().forward(x)


def linear_layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The layers whose products these are; what else derives from them may compute something else."""
    exactly = (nn.Linear, Conv1D, OneDnnLinear, OneDnnConv1D)
    return [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and type(m) in exactly]


def weight_of(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """`(out, in)`; a Conv1D's is a view."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()


def multiply_by_onednn(model: nn.Module) -> None:
    """Make the linear layers of `model` multiply so where that is faster, in place. Parameters and their names stay."""
    if is_faster():
        for layer in linear_layers(model):
            layer.__class__ = OneDnnLinear if isinstance(layer, nn.Linear) else OneDnnConv1D


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    float32_on_a_cpu = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return float32_on_a_cpu and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # As F.linear does: the input of a frozen layer is not kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = outputs
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_x = linear(rows, weight.t()).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        of_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None
