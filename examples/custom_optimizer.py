"""A plugin: an optimizer with an option of its own that skips non-finite steps on the device.

truthgpt train examples/custom_optimizer.yaml --plugin examples.custom_optimizer
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from truthgpt import OPTIMIZERS
from truthgpt.factories.registry import Options


class SignMomentum(torch.optim.Optimizer):
    """signSGD with momentum, "Signum" (Bernstein et al. 2018), and decoupled weight decay.

    Args:
        params: parameter groups; a group's own `weight_decay` wins.
        lr: every weight moves by this much a step.
        momentum: decay rate of the averaged gradient, in [0, 1).
    """

    # The trainer then sets `found_inf` (0-d, 1.0: take no step), and no value is read back from a GPU.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight against the sign of its averaged gradient; with `found_inf` nothing changes."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "average" not in self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                new_average = torch.lerp(weight.grad, average, group["momentum"])
                decayed = weight * (1 - group["lr"] * group["weight_decay"])
                new_weight = decayed - group["lr"] * new_average.sign()
                keep = torch.zeros((), dtype=torch.bool, device=weight.device) if found_inf is None else found_inf > 0
                average.copy_(torch.where(keep, average, new_average))
                weight.copy_(torch.where(keep, weight, new_weight))


class SignMomentumOptions(Options):
    """Options of `sign_momentum`."""

    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of the averaged gradient."""


@OPTIMIZERS.register("sign_momentum", options=SignMomentumOptions)
def build_sign_momentum(params: list[dict[str, Any]], lr: float, momentum: float) -> SignMomentum:
    """signSGD with momentum (Bernstein et al. 2018)."""
    return SignMomentum(params, lr=lr, momentum=momentum)
