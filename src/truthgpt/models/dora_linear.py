"""A linear layer with a weight-decomposed low-rank adapter (DoRA, Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.quantized_base import matrix


class DoraLinear(AdaptedLinear):
    """`m * (W + scaling * B @ A) / |W + scaling * B @ A|`, with a frozen `W` and the norm of every row (an output).

    The trained magnitudes `m`, `(out,)`, begin as the norms of `W`. No gradient goes through the norm (section 4.3 of
    the paper), and with dropout it is on the input of everything but the frozen product, as in peft. The sum
    `W + scaling * B @ A` is never made: its norms come from `W @ A.T`, which is as small as the adapter.
    """

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        lora_dropout: nn.Module,
        scaling: float,
    ) -> None:
        super().__init__(base_layer, lora_A, lora_B, lora_dropout, scaling)
        self.lora_magnitude_vector = nn.Parameter(self.norms())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`, computed in the type of `x`."""
        result: torch.Tensor = self.base_layer(x)
        if self.training and not isinstance(self.lora_dropout, nn.Identity):
            x = self.lora_dropout(x)
            low, product = self.product_with_a(x), F.linear(x, matrix(self.base_layer).to(x.dtype))
        else:
            low, product = self.low_rank(x), result if self.bias is None else result - self.bias
        ratio = self.lora_magnitude_vector / self.norms()
        # The ratio less one: near one, bf16 could not tell a trained magnitude from its start.
        change = product * (ratio - 1).to(x.dtype)
        return result + change + F.linear(low, (self.lora_B.weight * (self.scaling * ratio)[:, None]).to(x.dtype))

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """Norm of every row of `W + scaling * B @ A`, `(out,)`, at least in float32."""
        weight, a, b = matrix(self.base_layer), self.lora_A.weight, self.lora_B.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        a, b = a.to(exact), b.to(exact) * self.scaling
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
        mixed = F.linear(weight, a.to(weight.dtype)).to(exact) * b
        squares = squares + 2 * mixed.sum(1) + ((b @ (a @ a.T)) * b).sum(1)
        # A row of zeros stays one, instead of becoming NaN.
        norms: torch.Tensor = squares.clamp_min(torch.finfo(exact).tiny).sqrt()
        return norms

    def merged(self) -> torch.Tensor:
        """See `AdaptedLinear.merged`."""
        exact = super().merged()
        norms = torch.linalg.vector_norm(exact, dim=1).clamp_min(torch.finfo(exact.dtype).tiny)
        merged: torch.Tensor = exact * (self.lora_magnitude_vector.detach() / norms)[:, None]
        return merged
