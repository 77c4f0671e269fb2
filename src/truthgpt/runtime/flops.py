"""Model FLOPs a token and the peak of the device: the two halves of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


def matrix_weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights that multiply activations, each with its number of experts; one tied to two modules comes twice.

    Those are the `weight` of every module that is no embedding, when it has two dimensions or more (linear layers,
    convolutions, transformers' Conv1D, routers; one expert), and stacks of matrices `(E, ..., ...)`, E > 1, as
    mixture-of-experts layers hold. Norms (one dimension), biases and free parameters such as class tokens `(1, 1, D)`
    are none.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and parameter.ndim >= 2:
                yield parameter, 1
            elif parameter.ndim == 3 and parameter.shape[0] > 1:
                yield parameter, parameter.shape[0]


def weight_count(parameter: torch.Tensor) -> int:
    """How many weights a parameter holds: a byte has two four-bit ones."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def training_flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward, without any recomputation.

    Per token (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with attention counted as causal):

        sum over matrices of 6 * N  +  6 * layers * d_attn * seq_len

    2 * N forward, 2 * N for the gradient of the input and 2 * N for that of the weight; a frozen matrix lacks the last
    and counts 4 * N. The embedding look-up is none; the output head counts once, tied or not. Of E experts in a layer
    `num_experts_per_tok` count. d_attn is heads * head size; scores and weighted values are 4 * d_attn * seq_len
    forward over the full square, half of it when causal, three times that with the backward pass. Sliding windows are
    not subtracted.

    Args:
        model: a transformers model, or any module (one without a `config` of layers and heads has no attention term).
        seq_len: tokens a sample, T.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts_per_token: int | None = getattr(text_config, "num_experts_per_tok", None)
    matmul = 0.0
    for parameter, experts in matrix_weights(model):
        share = 1.0 if experts_per_token is None or experts == 1 else experts_per_token / experts
        matmul += (6.0 if parameter.requires_grad else 4.0) * weight_count(parameter) * share
    return matmul + 6.0 * _attention_width(text_config) * seq_len


def _attention_width(config: Any) -> int:
    """layers * heads * head size; 0 for a model that has no attention."""
    heads: int | None = getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers: int = config.num_hidden_layers
    return layers * heads * head_size


class _Peak(NamedTuple):
    name: str
    flops: float
    precisions: tuple[str, ...]


def _peak(name: str, teraflops: float, precisions: tuple[str, ...] = ("bf16", "fp16")) -> _Peak:
    return _Peak(name, teraflops * 1e12, precisions)


# Dense tensor-core peaks with float32 accumulation from the vendor's data sheets (where a sheet gives the figure with
# 2:4 sparsity, half of it). The first row whose words are all in the device's name counts: narrower rows come first.
_PEAKS = (
    _peak("b200", 2250),
    _peak("gh200", 989),
    _peak("h200 nvl", 835),
    _peak("h200", 989),
    _peak("h100 nvl", 835),
    _peak("h100 pcie", 756),
    _peak("h100", 989),
    _peak("h800", 989),
    _peak("h20", 148),
    _peak("a100", 312),
    _peak("a800", 312),
    _peak("a40", 149.7),
    _peak("a30", 165),
    _peak("a10g", 70),
    _peak("a10", 125),
    _peak("l40s", 362),
    _peak("l40", 181),
    _peak("l4", 121),
    _peak("rtx 4090", 165.2),
    _peak("rtx 3090", 71.2),
    _peak("v100 pcie", 112, precisions=("fp16",)),
    _peak("v100", 125, precisions=("fp16",)),
    _peak("t4", 65, precisions=("fp16",)),
)
# A slice of a GPU and chips that carry a bigger chip's name do not have its peak.
_OTHER_CHIPS = frozenset({"mig", "laptop", "d", "ti"})


def gpu_names() -> list[str]:
    """The GPUs whose speed is known."""
    return [peak.name.upper() for peak in _PEAKS]


def peak_flops(device: torch.device, precision_name: str) -> float | None:
    """Peak dense matrix-product speed in FLOP/s, for MFU; None when it is not known, as on any CPU.

    Args:
        device: the device that trains.
        precision_name: `bf16`, `fp16` or `none`; float32 has no entry, since TF32 makes two figures of it.
    """
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device), precision_name)


def peak_flops_by_name(device_name: str, precision_name: str) -> float | None:
    """`peak_flops` for a GPU as its driver names it, for example `NVIDIA H100 80GB HBM3`."""
    words = frozenset(re.split(r"[\s_-]+", device_name.lower()))
    if words & _OTHER_CHIPS:
        return None
    for peak in _PEAKS:
        if words.issuperset(peak.name.split()):
            return peak.flops if precision_name in peak.precisions else None
    return None
