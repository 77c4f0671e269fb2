"""A linear layer with a low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685), as fast as plain PyTorch makes it.

peft's own layer casts its input to the adapter's float32 and the sum back, and looks adapters up by name in every call.
Here activations keep their type, and only the adapter's two small matrices are cast. The trace of torch.compile has no
branch and no look-up, and is the same for every decoder layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from truthgpt.models.quantized_base import matrix


class AdaptedLinear(nn.Module):
    """`base(x) + scaling * B @ A @ dropout(x)`, with a frozen base. The names of its parts are peft's.

    Args:
        base_layer: nn.Linear, one of bitsandbytes' four-bit ones, or transformers' Conv1D.
        lora_A: the layer of A, `(r, in)`, without bias.
        lora_B: the layer of B, `(out, r)`, without bias.
        lora_dropout: on the adapter's input.
        scaling: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
    """

    def __init__(
        self,
        base_layer: nn.Linear | Conv1D,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        lora_dropout: nn.Module,
        scaling: float,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = lora_A
        self.lora_B = lora_B
        self.lora_dropout = lora_dropout
        self.scaling = scaling
        self._shared: SharedInput | None = None
        self._place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`, computed in the type of `x`."""
        result: torch.Tensor = self.base_layer(x)
        low = self.low_rank(x)
        # Scaling B costs nothing beside its cast; scaling `low` or the product would be a kernel of its own.
        return result + F.linear(low, (self.lora_B.weight * self.scaling).to(x.dtype))

    def share(self, shared: SharedInput, place: int) -> None:
        """Take the product with A from `shared`, where this layer is at `place`."""
        self._shared, self._place = shared, place

    @property
    def weight(self) -> torch.Tensor:
        """The base's, without the adapter: some models ask a layer for its weight's type or device."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's."""
        bias: torch.Tensor | None = self.base_layer.bias
        return bias

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """`A @ dropout(x)`, `(..., r)`, perhaps made together with other layers'."""
        return self.product_with_a(self.lora_dropout(x)) if self._shared is None else self._shared(x, self._place)

    def product_with_a(self, x: torch.Tensor) -> torch.Tensor:
        """`A @ x`, `(..., r)`."""
        return F.linear(x, self.lora_A.weight.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The weight of one layer that computes what base and adapter do, `(out, in)`, at least in float32."""
        weight = matrix(self.base_layer)
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(exact) + self.scaling * (self.lora_B.weight.to(exact) @ self.lora_A.weight.to(exact))


class SharedInput:
    """Layers without dropout that are called with one and the same tensor: it is multiplied by all their A's at once.

    The first layer called makes the products and the last one lets go of them. A layer that is called with another
    tensor than the first makes its own product, so the result never rests on what the model did when it was looked at.

    Not for activation checkpointing inside a compiled layer: torch.compile refuses what outlives a call there.

    Args:
        layers: in the order they are called.
    """

    def __init__(self, layers: Sequence[AdaptedLinear]) -> None:
        self._layers = list(layers)
        self._input: torch.Tensor | None = None
        self._products: tuple[torch.Tensor, ...] = ()
        for place, layer in enumerate(layers):
            layer.share(self, place)

    def __call__(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """`A @ x` of the layer at `place`, `(..., r)`."""
        if place == 0:
            matrices = [each.lora_A.weight for each in self._layers]
            products = F.linear(x, torch.cat(matrices).to(x.dtype))
            self._input, self._products = x, torch.split(products, [m.shape[0] for m in matrices], dim=-1)
        if x is not self._input:
            return self._layers[place].product_with_a(x)
        product = self._products[place]
        if place == len(self._layers) - 1:
            self._input, self._products = None, ()
        return product


def share_inputs(model: nn.Module, example: torch.Tensor) -> None:
    """Let layers of `model` that share an input share its product: the queries', keys' and values', say.

    Which ones do is seen in a forward pass. Layers that are called more than once, or have dropout (each its own), are
    left out.

    Args:
        example: token ids `(B, T)` on the model's device.
    """
    calls: list[tuple[AdaptedLinear, torch.Tensor]] = []

    def note(layer: AdaptedLinear, arguments: tuple[torch.Tensor]) -> None:
        calls.append((layer, arguments[0]))

    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(input_ids=example, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    called = [id(layer) for layer, _ in calls]
    groups: dict[int, list[AdaptedLinear]] = {}
    for layer, x in calls:
        if called.count(id(layer)) == 1 and isinstance(layer.lora_dropout, nn.Identity):
            groups.setdefault(id(x), []).append(layer)  # `calls` keeps the tensors, so that no id comes twice
    for group in groups.values():
        if len(group) > 1:
            SharedInput(group)
