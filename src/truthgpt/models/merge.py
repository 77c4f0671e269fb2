"""A plain model of transformers from a base and its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.added_tokens import AddedTokens
from truthgpt.models.quantized_base import is_quantized, matrix, take_quantization
from truthgpt.models.trained_weights import base_state


@torch.no_grad()
def merged_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class of `model`, without adapters, that computes what it does; to be saved, not to be called.

    Every weight is merged in float32 (`W + scaling * B @ A`, or DoRA's) and then rounded to `dtype`; quantised ones are
    dequantised. What has no adapter and is in `dtype` already is not copied.
    """
    architecture = type(model.config).from_dict(model.config.to_dict())
    take_quantization(architecture)
    tokens = model.get_input_embeddings().weight.shape[0]
    architecture.get_text_config().vocab_size, architecture.dtype = tokens, dtype
    with torch.device("meta"):
        merged = type(model)(architecture)
    state = base_state(model)
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            weight = layer.merged()
        elif is_quantized(layer) and not name.endswith(".base_layer"):
            weight = matrix(layer)
        elif isinstance(layer, AddedTokens):
            weight = layer.weight
        else:
            continue
        transposed = isinstance(merged.get_submodule(name), Conv1D)
        state[f"{name}.weight"] = (weight.T if transposed else weight).to(dtype)
    wanted = {name: state[name] for name in merged.state_dict()}
    rounded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in wanted.items()}
    merged.load_state_dict({name: value.contiguous() for name, value in rounded.items()}, assign=True)
    merged.tie_weights()
    merged.generation_config = model.generation_config
    return merged


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The adapted layers of `model` compute what their base does inside; rows of new tokens stay."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for layer in layers:
        layer.forward = layer.base_layer.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
