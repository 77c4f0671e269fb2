"""Linear layers on a CPU whose weights lie as the kernels for a few rows read them.

Otherwise every product lays them out anew, which takes longer than to multiply.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from truthgpt.runtime.device import free_memory_bytes
from truthgpt.runtime.onednn import is_faster, linear, linear_layers, pack, weight_of

logger = logging.getLogger(__name__)

SHARE = 0.5
"""The part of the free memory, where that is known, which the second copy of the weights may take."""


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Linear layers of `model`, on a CPU, multiply by packed copies of their float32 weights inside, without gradients,
    where that is faster and memory allows."""
    layers = [layer for layer in linear_layers(model) if is_faster() and layer.weight.dtype == torch.float32]
    needed, free = sum(layer.weight.nbytes for layer in layers), free_memory_bytes(torch.device("cpu"))
    if free is not None and needed > SHARE * free:
        logger.info("no packed copy of the weights for faster products: it takes %d bytes of %d free", needed, free)
        layers = []
    try:
        for layer in layers:
            packed = pack(weight_of(layer).detach().contiguous())
            layer.forward = partial(linear, weight=packed, bias=layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
