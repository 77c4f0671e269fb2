"""Which parameters weight decay touches."""

from __future__ import annotations

from typing import Any

from torch import nn

from truthgpt.runtime.flops import matrix_weights


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay; biases, norms, embeddings and all else do not.

    The kind of module decides, never a name: see `matrix_weights`. A weight that an embedding owns is an embedding
    wherever else it is used, as when the output head is tied to it. Every parameter appears once, in the order of
    `model.parameters()`; frozen ones are left out, and so is a group that would be empty.

    Args:
        model: the model to train.
        weight_decay: decoupled weight decay of the matrices.

    Returns:
        One or two groups, each `{"params": [...], "weight_decay": ...}`.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    matrices = {id(parameter) for parameter, _ in matrix_weights(model)} - embeddings
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
