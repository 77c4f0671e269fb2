"""A frozen base in four bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes makes the layers while transformers reads the weights; it is an extra, and imported where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truthgpt.errors import ConfigError, Problem

NF4 = "nf4"
_BLOCK = 64


def require_bitsandbytes() -> None:
    """Raise ConfigError when bitsandbytes cannot be imported."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # it loads a library for the GPU it finds
        message = f"nf4 needs the package bitsandbytes, which cannot be imported: {' '.join(str(error).split())}"
        hint = "pip install 'truthgpt[qlora]'"
        raise ConfigError([Problem(key="model.lora.quantization", message=message, suggestion=hint)]) from error


def refuse_quantized(name_or_path: str, architecture: PreTrainedConfig) -> None:
    """Raise ConfigError when the weights of a model are bitsandbytes' own already: no other format of them is saved."""
    found: Any = getattr(architecture, "quantization_config", None)
    method = getattr(found, "quant_method", None) or (found or {}).get("quant_method")
    if method == "bitsandbytes":
        message = f"{name_or_path} holds weights that are quantised already"
        hint = "name the model they come from, and set model.lora.quantization: nf4"
        raise ConfigError([Problem(key="model.name_or_path", message=message, suggestion=hint)])


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is asked for; products are computed in `compute_dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def take_quantization(architecture: PreTrainedConfig) -> bool:
    """Whether a run's saved configuration says that its base was quantised as it was read; it says so no longer.

    transformers would take the weights in the base's own folder for quantised ones.
    """
    found: Any = getattr(architecture, "quantization_config", None)
    if found is None:
        return False
    del architecture.quantization_config
    return True


def prepare_quantized(model: PreTrainedModel) -> None:
    """Let the four-bit layers of `model` compute in evaluation what they compute in training.

    On processors with bf16 instructions bitsandbytes would repack the weights at the first evaluation, for a product
    that rounds otherwise.

    Raises:
        ConfigError: on a CPU, a layer whose rows are no whole blocks: bitsandbytes 0.50 dequantises it wrongly.
    """
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        layer.support_avx512bf16_for_cpu = False
        if model.device.type == "cpu" and layer.in_features % _BLOCK:
            found = f"{name} has {layer.in_features} inputs"
            message = f"{found}, and on a CPU bitsandbytes needs a multiple of {_BLOCK} for nf4"
            hint = "set it to none, or train on a GPU"
            raise ConfigError([Problem(key="model.lora.quantization", message=message, suggestion=hint)])


def is_quantized(layer: Any) -> bool:
    """Whether `layer` is one of bitsandbytes' linear ones in four bits."""
    return isinstance(layer, nn.Linear) and getattr(layer.weight, "quant_state", None) is not None


def matrix(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight of a linear layer as `(out, in)`: a view, or a new tensor where it is quantised; no gradient."""
    weight: Any = layer.weight
    if is_quantized(layer):
        from bitsandbytes.functional import dequantize_4bit

        plain: torch.Tensor = dequantize_4bit(weight.detach(), weight.quant_state)
        return plain
    matrix: torch.Tensor = weight.detach()
    return matrix.T if isinstance(layer, Conv1D) else matrix
