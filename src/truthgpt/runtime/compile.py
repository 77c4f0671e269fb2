"""torch.compile, one decoder layer at a time, and back to eager with one line when it cannot be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from truthgpt.runtime.fallbacks import Fallbacks

BREAK_EVEN_S = 30.0
"""Training time without compiling from which on it pays on a GPU. Measured on one H200 with an empty cache: 13 s to
compile GPT-2 124M, whose steps then take half the time, and 7 s for a Llama of 1B, whose steps take three quarters:
even after 26 and 28 s."""
EAGER_UTILISATION = 0.3
"""Share of the GPU's peak that layers which are not compiled reach, to estimate that time (0.20 and 0.39 there)."""


UNKNOWN_PEAK_FLOPS = 100e12
"""What a GPU is taken for whose peak is not known."""


def compile_pays(wanted: bool | Literal["auto"], device: torch.device, eager_run_s: float) -> bool:
    """Whether to compile: as asked, or by `auto`'s rule: on a GPU, for a run of at least `BREAK_EVEN_S`."""
    if wanted == "auto":
        return device.type == "cuda" and eager_run_s >= BREAK_EVEN_S
    return wanted


def estimated_run_s(run_flops: float, peak_flops: float | None) -> float:
    """Seconds that a run takes without compiling."""
    return run_flops / (EAGER_UTILISATION * (peak_flops or UNKNOWN_PEAK_FLOPS))


def can_replay(device: torch.device, fixed_shapes: bool, detect_anomaly: bool, fallbacks: Fallbacks) -> bool:
    """Whether forward and backward can be recorded as a CUDA graph (`compile_mode: reduce-overhead`)."""
    reason = None
    if device.type != "cuda":
        reason = f"CUDA graphs need a CUDA GPU, this run is on {device.type}"
    elif not fixed_shapes:
        reason = "a CUDA graph holds one shape, and these batches have many; data.packing gives them one"
    elif detect_anomaly:
        reason = "training.detect_anomaly reads values back"
    if reason is not None:
        fallbacks.take("training.compile_mode", "reduce-overhead", "default", reason)
    return reason is None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated layers: the longest list of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])


def compile_layers(
    model: nn.Module, mode: str, fixed_shapes: bool, probe: Callable[[], None], fallbacks: Fallbacks
) -> bool:
    """Compile each decoder layer in place, so that no state key changes; whether that could be done.

    Args:
        mode: mode of torch.compile.
        fixed_shapes: every batch has the same shape, so nothing need be compiled for varying ones.
        probe: runs one forward and backward pass; compilation errors show there, not in the middle of a run.
        fallbacks: told when the layers stay eager.
    """
    layers = decoder_layers(model)
    if not layers:
        fallbacks.take("training.torch_compile", "compiled layers", "eager", "the model has no list of equal layers")
        return False
    reason = ""
    for fullgraph in (True, False):
        for layer in layers:
            layer.compile(fullgraph=fullgraph, dynamic=False if fixed_shapes else None, mode=mode)
        try:
            probe()
            return True
        except torch.OutOfMemoryError:
            raise
        except (TorchDynamoException, RuntimeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            _make_eager(layers)
    fallbacks.take("training.torch_compile", "compiled layers", "eager", reason)
    return False


def _make_eager(layers: list[nn.Module]) -> None:
    for layer in layers:
        layer._compiled_call_impl = None
    torch._dynamo.reset()
