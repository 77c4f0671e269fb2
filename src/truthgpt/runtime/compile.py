"""torch.compile, one decoder layer at a time, and back to eager with one line when it cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from truthgpt.runtime.fallbacks import Fallbacks

BREAK_EVEN_TOKENS = 5_000_000
"""Tokens after which compiling pays on a GPU: 20 s of compiling against 4 microseconds saved a token (1B model)."""


def compile_pays(wanted: bool | Literal["auto"], device: torch.device, total_tokens: int) -> bool:
    """Whether to compile: as asked, or by `auto`'s rule: on a GPU, for a run of at least `BREAK_EVEN_TOKENS`."""
    if wanted == "auto":
        return device.type == "cuda" and total_tokens >= BREAK_EVEN_TOKENS
    return wanted


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])


def compile_layers(
    model: nn.Module, mode: str, fixed_shapes: bool, probe: Callable[[], None], fallbacks: Fallbacks
) -> None:
    """Compile each decoder layer in place, so that no state key changes.

    Args:
        mode: mode of torch.compile.
        fixed_shapes: every batch has the same shape, so nothing need be compiled for varying ones.
        probe: runs one forward and backward pass; compilation errors show there, not in the middle of a run.
        fallbacks: told when the layers stay eager.
    """
    layers = decoder_layers(model)
    if not layers:
        fallbacks.take("training.torch_compile", "compiled layers", "eager", "the model has no list of equal layers")
        return
    reason = ""
    for fullgraph in (True, False):
        for layer in layers:
            layer.compile(fullgraph=fullgraph, dynamic=False if fixed_shapes else None, mode=mode)
        try:
            probe()
            return
        except torch.OutOfMemoryError:
            raise
        except (TorchDynamoException, RuntimeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            _make_eager(layers)
    fallbacks.take("training.torch_compile", "compiled layers", "eager", reason)


def _make_eager(layers: list[nn.Module]) -> None:
    for layer in layers:
        layer._compiled_call_impl = None
    torch._dynamo.reset()
