"""Compute precision as an object: autocast, loss scaling, and an optimizer step that the device itself can skip."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from truthgpt.runtime.compile import decoder_layers
from truthgpt.runtime.fallbacks import Fallbacks

logger = logging.getLogger(__name__)


class Precision(Protocol):
    """How a run computes. Order of one step: `autocast` and `scale` for each micro-batch, `unscale`, `step`."""

    name: str
    """`bf16`, `fp16` or `none` (float32), the precision in use."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for a forward pass."""
        ...

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        ...

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their true size, once a step, before they are measured or clipped."""
        ...

    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None = None) -> None:
        """`optimizer.step()` on the gradients divided by `divisor`, unless `skip` is 1.0: then nothing changes at all.

        Both are 0-d float tensors on the device.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, plain values; empty where there is none."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class OptimizerStep:
    """`optimizer.step()` with a mask and a divisor of the gradients that live on the device.

    Optimizers that declare `_step_supports_amp_scaling` (torch's fused ones and our own) apply both themselves, in the
    pass over the gradients that they make anyway and without a host sync; for any other the mask is read back once a
    step, which is said once.
    """

    def __init__(self) -> None:
        self._said = False

    def __call__(self, optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None = None) -> None:
        """Step unless `skip` (0-d float tensor) is 1.0; with 1.0 parameters and optimizer state keep every bit."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
            return
        if divisor is not None:
            for gradients in _gradients_by_dtype(optimizer).values():
                torch._foreach_div_(gradients, divisor)
        if not self._said:
            self._said = True
            logger.info(
                "%s cannot skip a non-finite step on the device: one value is read back every step",
                type(optimizer).__name__,
            )
        if not skip.item():
            optimizer.step()


class UnscaledPrecision:
    """float32, or autocast to a type that needs no loss scaling (bf16). Keeps no state.

    Args:
        name: `none` or `bf16`.
        device: where the run computes.
        dtype: type autocast computes in; None: no autocast.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype | None) -> None:
        self.name = name
        self._device_type = device.type
        self._dtype = dtype
        self._step = OptimizerStep()

    def autocast(self) -> AbstractContextManager[Any]:
        """torch.autocast, or nothing for float32."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device_type, dtype=self._dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss as it is."""
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do."""

    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None = None) -> None:
        """See `OptimizerStep`."""
        self._step(optimizer, skip, divisor)

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load; the scale of a run that went on from fp16 is no longer needed."""


class ScaledPrecision:
    """fp16 autocast with dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740), as torch.amp.GradScaler.

    The scale halves after a step whose gradients overflowed (that step is skipped) and doubles after `growth_interval`
    steps in a row without one. GradScaler itself cannot take a second reason to skip, the guards', without reading it
    back from the device; the kernels are the same.

    Args:
        device: where the run computes; gradients must live there.
        dtype: type autocast computes in.
        initial_scale: factor on the loss at the first step.
        growth_interval: steps without overflow before the scale doubles.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        initial_scale: float = 65536.0,
        growth_interval: int = 2000,
    ) -> None:
        self.name = "fp16"
        self._device_type = device.type
        self._dtype = dtype
        self._growth_interval = growth_interval
        self._scale = torch.full((), initial_scale, dtype=torch.float32, device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        self._found_inf: Tensor | None = None
        self._step = OptimizerStep()

    def autocast(self) -> AbstractContextManager[Any]:
        """torch.autocast."""
        return torch.autocast(self._device_type, dtype=self._dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """Loss times the current scale."""
        return loss * self._scale

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale and note on the device whether any is not finite.

        Raises:
            RuntimeError: called twice without `step` in between.
        """
        if self._found_inf is not None:
            raise RuntimeError("unscale was called twice in one step; it would divide the gradients twice")
        self._found_inf = torch.zeros_like(self._scale)
        inverse = self._scale.reciprocal()
        for gradients in _gradients_by_dtype(optimizer).values():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found_inf, inverse)

    def step(self, optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None = None) -> None:
        """Step unless `skip` is 1.0 or a gradient overflowed, then update the scale (for overflow only).

        Raises:
            RuntimeError: `unscale` was not called.
        """
        if self._found_inf is None:
            raise RuntimeError("unscale must be called before step")
        found_inf, self._found_inf = self._found_inf, None
        self._step(optimizer, torch.maximum(found_inf, skip.to(found_inf.dtype)), divisor)
        torch._amp_update_scale_(self._scale, self._growth_tracker, found_inf, 2.0, 0.5, self._growth_interval)

    def state_dict(self) -> dict[str, Any]:
        """The scale and the steps since it last changed."""
        return {"scale": self._scale.item(), "growth_tracker": int(self._growth_tracker.item())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the saved scale; of a run without one (it was not fp16) keep the initial scale and say so."""
        if not state:
            logger.info("the checkpoint has no loss scale: fp16 starts from %g", self._scale.item())
            return
        self._scale.fill_(state["scale"])
        self._growth_tracker.fill_(state["growth_tracker"])


def choose_precision(wanted: str, device: torch.device, fallbacks: Fallbacks) -> Precision:
    """The precision asked for, or the best the device has; another one is recorded as a fallback.

    bf16 falls back to fp16 on a GPU that lacks it and to float32 elsewhere, fp16 to float32 on anything but a GPU.

    Args:
        wanted: `bf16`, `fp16` or `none` (float32).
        device: where the run computes.
        fallbacks: takes the one line that says so.

    Raises:
        ConfigError: the device lacks it and `fallbacks` is strict.
    """
    key = "training.mixed_precision"
    used = wanted
    if wanted == "bf16" and not has_native_bf16(device):
        used = "fp16" if device.type == "cuda" else "none"
        missing = "instructions" if device.type == "cpu" else "support in torch's autocast"
        reason = f"this {device.type} device has no native bf16 {missing}"
        fallbacks.take(key, wanted, used, reason if used == "fp16" else f"{reason}; computing in float32")
    elif wanted == "fp16" and device.type != "cuda":
        used = "none"
        fallbacks.take(key, wanted, used, f"fp16 training needs a CUDA GPU, not {device.type}; computing in float32")
    if used == "fp16":
        return ScaledPrecision(device)
    return UnscaledPrecision(used, device, torch.bfloat16 if used == "bf16" else None)


def hold_weights_in_bf16(model: torch.nn.Module, sum_in_float32: bool) -> UnscaledPrecision:
    """Make the model's parameters bf16 in place, and give the precision that computes in their type, without autocast.

    Buffers stay as they are: those of rotary embeddings need float32.

    Args:
        sum_in_float32: gradients of several micro-batches are summed up in float32, as they arrive.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():  # not a quantised one
            parameter.data = parameter.data.bfloat16()
        if sum_in_float32 and parameter.requires_grad:
            parameter.grad_dtype = torch.float32
    return UnscaledPrecision("bf16", parameter.device, None)


def hold_frozen_in_bf16(model: torch.nn.Module) -> UnscaledPrecision:
    """`hold_weights_in_bf16` for the weights that are not trained; those that are keep their type."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    return UnscaledPrecision("bf16", parameter.device, None)


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """`model` computes in float32 inside, though its weights are held in half precision, for probes that need it.

    There is never a float32 copy of the whole: each of the repeated layers, the embedding and the head are cast while
    they compute. Afterwards the weights are as they were, bit for bit. Quantised layers (of bitsandbytes) compute in
    float32 with the weights they have.
    """
    parts = decoder_layers(model)
    if isinstance(model, PreTrainedModel):
        ends = {model.get_input_embeddings(), model.get_output_embeddings()}
        parts += [end for end in ends if isinstance(end, torch.nn.Module)]
    quantized = [module for module in model.modules() if getattr(module, "compute_dtype", None) == torch.bfloat16]
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    own: dict[torch.nn.Parameter, Tensor] = {}

    def cast(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                own[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in own:
                parameter.data = own.pop(parameter)

    hooks = [part.register_forward_pre_hook(lambda part, _: cast(part.parameters())) for part in parts]
    hooks += [
        part.register_forward_hook(lambda part, *_: restore(part.parameters()), always_call=True) for part in parts
    ]
    cast(parameter for parameter in model.parameters() if id(parameter) not in inside)
    for module in quantized:
        module.compute_dtype = torch.float32  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in quantized:
            module.compute_dtype = torch.bfloat16  # type: ignore[assignment]
        restore(list(own))
        for hook in hooks:
            hook.remove()


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; emulation, slower than float32, does not count.

    On MPS the answer is no: autocast to bf16 there depends on the macOS version.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # torch.ops.mkldnn._is_mkldnn_bf16_supported also says yes to AVX-512 without bf16, where oneDNN emulates it.
        capabilities = torch.cpu.get_capabilities()
        return any(name in capabilities and capabilities[name] for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def _gradients_by_dtype(optimizer: torch.optim.Optimizer) -> dict[torch.dtype, list[Tensor]]:
    """All gradients of an optimizer; the unscaling kernel takes lists of one dtype."""
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    return gradients
