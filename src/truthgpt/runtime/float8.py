"""Linear layers that multiply in float8 (Micikevicius et al. 2022, arXiv 2209.05433), by torchao.

It is an extra, and imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Recipe = Literal["tensorwise", "rowwise"]

LOWEST_CAPABILITY = (8, 9)
"""Of a GPU that multiplies float8 matrices."""
SIZE_MULTIPLE = 16
"""Of both sizes of a layer: what such a product takes."""


def float8_obstacle(device: torch.device) -> str | None:
    """Why nothing can be multiplied in float8 here, or None."""
    if device.type != "cuda":
        return f"float8 products need a CUDA GPU, this run is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"float8 products need compute capability 8.9, this GPU has {'.'.join(map(str, capability))}"
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"the package torchao cannot be imported ({error}): pip install 'truthgpt[torchao]'"
    return None


def multiply_in_float8(layers: Sequence[nn.Module], recipe: Recipe) -> int:
    """Make the linear layers inside `layers` multiply in float8, forward and backward, in place; how many there are.

    Parameters, their names and types stay. Inputs, weights and gradients are scaled anew for every product, by their
    largest value (`tensorwise`) or that of each row (`rowwise`). Layers of other sizes than float8 takes stay as they
    are.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        del name
        return type(module) is nn.Linear and not (
            module.in_features % SIZE_MULTIPLE or module.out_features % SIZE_MULTIPLE
        )

    config = Float8LinearConfig.from_recipe_name(recipe)
    converted = 0
    for layer in layers:
        converted += sum(fits(module, name) for name, module in layer.named_modules())
        convert_to_float8_training(layer, module_filter_fn=fits, config=config)
    return converted
