"""Which kind of parameter each one is: what weight decay touches, and what Muon may update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from truthgpt.runtime.flops import matrix_weights

HIDDEN, MATRIX, OTHER = "hidden", "matrix", "other"
"""What a group says it is, as its `kind`."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay; biases, norms, embeddings and all else do not.

    The kind of module decides, never a name: see `matrix_weights`. A weight that an embedding owns is an embedding
    wherever else it is used, as when the output head is tied to it. Every parameter appears once, in the order of
    `model.parameters()`; frozen ones are left out, and so is a group that would be empty.

    Args:
        model: the model to train.
        weight_decay: decoupled weight decay of the matrices.

    Returns:
        Up to three groups, each `{"params": [...], "weight_decay": ..., "kind": ...}`. `hidden`: the matrices of linear
        layers below a list of layers (`nn.ModuleList`), two-dimensional, `(out, in)` or, in a Conv1D, `(in, out)`.
        `matrix`: all others that decay: the output head, convolutions, stacks of experts. `other`: what does not decay.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    matrices = {id(parameter) for parameter, _ in matrix_weights(model)} - embeddings
    hidden = {id(layer.weight) for layer in _repeated_linear_layers(model)} & matrices
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    members: dict[str, list[nn.Parameter]] = {HIDDEN: [], MATRIX: [], OTHER: []}
    for parameter in trainable:
        kind = HIDDEN if id(parameter) in hidden else MATRIX if id(parameter) in matrices else OTHER
        members[kind].append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if kind == OTHER else weight_decay, "kind": kind}
        for kind, parameters in members.items()
        if parameters
    ]


def _repeated_linear_layers(model: nn.Module) -> Iterator[nn.Linear | Conv1D]:
    for layers in model.modules():
        if isinstance(layers, nn.ModuleList):
            yield from (module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D))
