"""What the GPU kernels of the backends have in common: half precision, causal, no dropout, heads of at most 256."""

from __future__ import annotations

from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
MIN_CAPABILITY = (8, 0)


def in_autocast_type(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value in the type that autocast computes in, where it is on: rotary embeddings leave float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def kernels_fit(query: torch.Tensor, dropout: float) -> bool:
    """Whether the kernels can compute this call."""
    return query.is_cuda and query.dtype in HALF and query.shape[-1] <= MAX_HEAD_SIZE and dropout == 0.0


def kernel_obstacle(architecture: Any, device: torch.device, precision: str) -> str | None:
    """Why the kernels cannot serve a model; None when they can."""
    if device.type != "cuda":
        return f"its kernels need a CUDA GPU, this run is on {device.type}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"its kernels need a GPU of compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if precision == "none":
        return "its kernels compute in half precision, and training.mixed_precision is none"
    config = architecture.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model bends its attention scores (attn_logit_softcapping)"
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_size > MAX_HEAD_SIZE:
        return f"its kernels take heads of at most {MAX_HEAD_SIZE}, the model's have {head_size}"
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(config, name, 0.0):
            return f"its kernels have no dropout, the model's {name} is {getattr(config, name)} (0.0 is faster)"
    return None
