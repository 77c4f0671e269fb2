"""Linear layers that share an input, such as those of queries, keys and values, as one matrix product.

A batch of a few rows takes as long as its weights take to be read, and small matrices are read at a fraction of the
memory's speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class JoinedLinear(nn.Module):
    """One of several layers that are called with the same tensor. A call with another tensor is computed alone."""

    def __init__(self, linear: nn.Linear, shared: SharedProduct, place: int) -> None:
        super().__init__()
        self.linear = linear
        self._shared, self._place = shared, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes."""
        return self._shared(x, self._place)


class SharedProduct:
    """The product of an input with the weights of `layers`, in the order they are called; theirs become parts of one
    matrix, which takes no further memory."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = list(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight.data for layer in layers])
        biases = [layer.bias for layer in layers]
        self._bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        for layer, part in zip(layers, torch.split(self._weight, self._sizes), strict=True):
            layer.weight.data = part
        self._input: torch.Tensor | None = None
        self._products: tuple[torch.Tensor, ...] = ()

    def __call__(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """The product of the layer at `place`."""
        if place == 0:
            self._input = x
            self._products = torch.split(F.linear(x, self._weight, self._bias), self._sizes, dim=-1)
        if x is not self._input:
            layer = self._layers[place]
            return F.linear(x, layer.weight, layer.bias)
        product = self._products[place]
        if place == len(self._layers) - 1:
            self._input, self._products = None, ()
        return product


@contextmanager
def joined_linears(model: nn.Module) -> Iterator[None]:
    """Layers of `model` that share an input compute it together inside, as seen in a forward pass of two tokens."""
    groups = _groups(model)
    names = {id(layer): name for name, layer in model.named_modules()}
    replaced: list[tuple[nn.Module, str, nn.Linear]] = []
    for group in groups:
        shared = SharedProduct(group)
        for place, layer in enumerate(group):
            parent, _, name = names[id(layer)].rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, name, JoinedLinear(layer, shared, place))
            replaced.append((owner, name, layer))
    try:
        yield
    finally:
        for owner, name, layer in replaced:
            setattr(owner, name, layer)


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """Layers called once, with one and the same tensor, in the order of the calls."""
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def note(layer: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        assert isinstance(layer, nn.Linear)
        calls.append((layer, arguments[0]))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if type(module) is nn.Linear]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    called = [id(layer) for layer, _ in calls]
    groups: dict[tuple[int, bool], list[nn.Linear]] = {}
    for layer, x in calls:
        if called.count(id(layer)) == 1:
            groups.setdefault((id(x), layer.bias is None), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]
