"""What training changes of a model, which is what a checkpoint holds: all of it, or only the adapters on a frozen base.

A checkpoint of adapters says which base they belong to by a digest of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from truthgpt.errors import CheckpointError, ConfigError, Problem
from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.added_tokens import AddedTokens

BASE_DIGEST = "base.sha256"
"""The entry of a state of adapters that is no weight: the digest of their base, uint8 `(32,)`."""
_SAMPLES = 1024
_BASE = "base_layer."
_KEPT_DIGEST = "_truthgpt_base_digest"


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `model` for a checkpoint: its whole state dict, or its adapters and their base's digest."""
    if not has_adapters(model):
        return model.state_dict()
    return {**adapter_weights(model), BASE_DIGEST: _base_digest(model)}


def load_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put a `trained_state` of the same names and shapes into `model`.

    Raises:
        CheckpointError: it is of adapters on another base; nothing is changed.
        RuntimeError: other names or shapes.
    """
    if not has_adapters(model):
        model.load_state_dict(state)
        return
    if not torch.equal(state[BASE_DIGEST].cpu(), _base_digest(model)):
        raise CheckpointError(
            "the checkpoint's adapters were trained on a base model with other weights than this one: give the base "
            "they started from (model.name_or_path; one made from scratch depends on seed, device and precision)"
        )
    load_adapter_weights(model, {name: value for name, value in state.items() if name != BASE_DIGEST})


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is a frozen base with adapters."""
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' weights by the names peft saves them under, less its prefix; empty for a model without adapters.

    What tied tables share stands under the name of the first.
    """
    weights, seen = {}, set()
    for name, layer in _adapted_layers(model).items():
        for part, parameter in layer.named_parameters():
            if not part.startswith(_BASE) and id(parameter) not in seen:
                seen.add(id(parameter))
                weights[f"{name}.{part}"] = parameter.detach()
    return weights


def load_adapter_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights`, named as by `adapter_weights`, into the adapters of `model`.

    Raises:
        RuntimeError: other names or shapes than the model's.
    """
    differing = weights.keys() ^ adapter_weights(model).keys()
    if differing:
        raise RuntimeError(f"{min(differing)} is not on both sides")
    model.load_state_dict(dict(weights), strict=False)


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the base below the adapters, as it was before they were added."""
    state = model.state_dict()
    for name, layer in _adapted_layers(model).items():
        for part in layer.state_dict():
            value = state.pop(f"{name}.{part}")
            if part.startswith(_BASE):
                state[f"{name}.{part.removeprefix(_BASE)}"] = value
    return dict(state)


def check_adapters_are_reached(model: nn.Module) -> None:
    """After a backward pass: every adapter has a gradient.

    Raises:
        ConfigError: naming those that have none: the model uses the layer they stand on by another way than calling it.
    """
    problems = []
    for name, layer in _adapted_layers(model).items():
        if any(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters()):
            message = f"no gradient reaches the adapter of {name}: the model does not call this layer"
            hint = "list the layers to adapt without it"
            problems.append(Problem(key="model.lora.target_modules", message=message, suggestion=hint))
    if problems:
        raise ConfigError(problems)


def _adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear | AddedTokens]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear | AddedTokens)}


def _base_digest(model: nn.Module) -> torch.Tensor:
    """SHA-256 over name, shape, sum and sample of every tensor of the base, uint8 `(32,)`; made once, as it is frozen.

    Of the weights rounded to bf16, so that a base is the same in either precision. Sums of their bits are exact in any
    order and see a change anywhere, the samples see an exchange; hashing all of 16 GB would take half a minute.
    """
    kept: torch.Tensor | None = getattr(model, _KEPT_DIGEST, None)
    if kept is not None:
        return kept
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        bits = tensor.bfloat16().view(torch.int16) if tensor.is_floating_point() else tensor
        flat = bits.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.int64)
        total = int(flat.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(tensor.shape)} {total} {sample.tolist()}\n".encode())
    made = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    setattr(model, _KEPT_DIGEST, made)
    return made
