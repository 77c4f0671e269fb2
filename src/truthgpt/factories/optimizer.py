"""OPTIMIZERS: what updates the weights.

A builder receives parameter groups (dicts with their own `weight_decay` and `kind`, see `optim.groups`) and returns a
`torch.optim.Optimizer`. `fused`, `weights` (`training.weights`) and `seed` reach only a builder that names them; an
optimizer whose builder does not name `weights` updates float32 weights only. What stands in for an entry that is not
available takes those of its options that it knows itself.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import AfterValidator, Field

from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.registry import Availability, Options, Registry

if TYPE_CHECKING:
    import torch

OPTIMIZERS = Registry("optimizer", runtime=("params", "lr", "weight_decay", "fused", "weights", "seed"))
SCHEDULE_FREE = "schedule_free"

Betas = Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)]
"""Two decay rates in [0, 1), as YAML writes them: `[0.9, 0.95]`."""
NotNegative = Annotated[float, Field(ge=0.0)]


def _second_is_number(eps: list[float | None]) -> list[float | None]:
    if eps[1] is None:
        raise ValueError("the second value must be a number, only the first may be null")
    return eps


AdafactorEps = Annotated[list[NotNegative | None], Field(min_length=2, max_length=2), AfterValidator(_second_is_number)]
"""A number or null, then a number."""


class AdamWOptions(Options):
    """Options of `adamw`."""

    betas: Betas = Field(default=[0.9, 0.999])
    """Decay rates of the averages of the gradient and of its square."""
    eps: NotNegative = 1e-8
    """Added to the denominator."""


class MuonOptions(AdamWOptions):
    """Options of `muon`; `betas` and `eps` are those of its AdamW."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    """Newton-Schulz iterations that bring all singular values of an update near 1."""


def _first_is_positive(betas: list[float]) -> list[float]:
    if betas[0] <= 0.0:
        raise ValueError("the first value must be above 0")
    return betas


class ScheduleFreeOptions(Options):
    """Options of `schedule_free`."""

    betas: Annotated[Betas, AfterValidator(_first_is_positive)] = Field(default=[0.9, 0.999])
    """Share of the average in the weights that are trained, above 0, and decay rate of the average of the squared
    gradient."""
    eps: NotNegative = 1e-8
    """Added to the denominator."""


class LionOptions(Options):
    """Options of `lion`."""

    betas: Betas = Field(default=[0.9, 0.99])
    """Share of the momentum in the update, and decay rate of the momentum."""


class AdafactorOptions(Options):
    """Options of `adafactor`."""

    eps: AdafactorEps = Field(default=[None, 1e-3])
    """Floor of the squared gradients' root (null: the machine epsilon of the weights) and of the weights' RMS."""
    d: Annotated[float, Field(ge=1.0)] = 1.0
    """Clipping threshold of the update's RMS."""
    beta2_decay: Annotated[float, Field(le=0.0)] = -0.8
    """Exponent of the step in the decay of the squared gradients, 1 - step ** beta2_decay."""


@OPTIMIZERS.register("adamw", options=AdamWOptions)
def build_adamw(
    params: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    betas: list[float],
    eps: float,
    fused: bool = True,
    weights: str = "float32",
    seed: int = 0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): our kernel on a GPU, torch's fused one on a CPU."""
    import torch

    from truthgpt.optim.adamw import AdamW
    from truthgpt.runtime.device import has_triton

    on_gpu = all(p.device.type == "cuda" for group in params for p in group["params"])
    if weights != "float32" or (fused and on_gpu and has_triton()):
        return AdamW(
            params,
            lr,
            (betas[0], betas[1]),
            eps,
            weight_decay,
            rounding="stochastic" if weights == "bf16_stochastic" else "master",
            seed=seed,
        )
    fusable = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in params for p in g["params"])
    # Not False: that would also rule out the foreach kernels, the best there is without fusing.
    kernel = True if fused and fusable else None
    beta1, beta2 = betas
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=kernel)

    def keep_kernel(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # Loading would bring back the kernel of the run that saved, which may have been on another device.
        return {**state, "param_groups": [{**group, "fused": kernel} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    return optimizer


def _probe_adamw8bit() -> Availability:
    """Without importing torch; torchao's step is compiled on every device."""
    from truthgpt.runtime.compiler import cxx_candidates, cxx_compiler

    if importlib.util.find_spec("torchao") is None:
        return Availability(False, "torchao is not installed: pip install 'truthgpt[torchao]'", "adamw")
    if cxx_compiler() is None:
        tried = ", ".join(cxx_candidates())
        return Availability(False, f"torchao compiles its step, and there is no C++ compiler ({tried})", "adamw")
    return Availability(True)


@OPTIMIZERS.register("adamw8bit", options=AdamWOptions, probe=_probe_adamw8bit)
def build_adamw8bit(
    params: list[dict[str, Any]], lr: float, weight_decay: float, betas: list[float], eps: float
) -> torch.optim.Optimizer:
    """AdamW with averages in 8 bits (Dettmers et al. 2022), torchao's: a quarter of AdamW's state."""
    from truthgpt.optim.adamw8bit import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(
        params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay
    )
    return optimizer


@OPTIMIZERS.register("muon", options=MuonOptions)
def build_muon(
    params: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    betas: list[float],
    eps: float,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024): orthogonalised momentum for the layers' matrices, AdamW for the rest; AdamW's rate."""
    from truthgpt.optim.groups import HIDDEN
    from truthgpt.optim.joined import Joined
    from truthgpt.optim.muon import Muon

    hidden = [group for group in params if group.get("kind") == HIDDEN]
    rest = [group for group in params if group.get("kind") != HIDDEN]
    if not hidden:
        message = "muon is for the matrices of linear layers, and none of the model's repeated layers has one to train"
        raise ConfigError([Problem(key="optimizer.type", message=message, suggestion="use adamw")])
    # An update's RMS is made that of AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate serves both, and
    # the factor is that of the transposed matrix, so it does not matter which way round a layer stores its own.
    muon = Muon(
        hidden,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    return Joined([muon, build_adamw(rest, lr, weight_decay, betas, eps, fused)] if rest else [muon])


def _probe_schedule_free() -> Availability:
    if importlib.util.find_spec("schedulefree") is None:
        return Availability(False, "the package schedulefree is not installed: pip install 'truthgpt[schedule_free]'")
    return Availability(True)


@OPTIMIZERS.register(SCHEDULE_FREE, options=ScheduleFreeOptions, probe=_probe_schedule_free)
def build_schedule_free(
    params: list[dict[str, Any]], lr: float, weight_decay: float, betas: list[float], eps: float
) -> torch.optim.Optimizer:
    """AdamW without a schedule (Defazio et al. 2024), schedulefree's: keeps an average, which is the model."""
    from truthgpt.optim.schedule_free import ScheduleFreeAdamW

    optimizer: torch.optim.Optimizer = ScheduleFreeAdamW(params, lr, (betas[0], betas[1]), eps, weight_decay)
    return optimizer


@OPTIMIZERS.register("lion", options=LionOptions)
def build_lion(
    params: list[dict[str, Any]], lr: float, weight_decay: float, betas: list[float]
) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023): sign of the momentum; half of AdamW's state, about a tenth of its learning rate."""
    from truthgpt.optim.lion import Lion

    beta1, beta2 = betas
    return Lion(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


@OPTIMIZERS.register("adafactor", options=AdafactorOptions)
def build_adafactor(
    params: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    eps: list[float | None],
    d: float,
    beta2_decay: float,
) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018), torch's: factored second moments, steps relative to the weights' RMS."""
    import torch

    floor, scale = eps[0], cast(float, eps[1])  # the options model lets only the first be null
    return torch.optim.Adafactor(
        params, lr=lr, beta2_decay=beta2_decay, eps=(floor, scale), d=d, weight_decay=weight_decay
    )
