"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), torch's, skipped on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon with the attributes of torch's fused AdamW.

    `step` divides the gradients by `grad_scale`, in place, and, where `found_inf` (one float element on the device) is
    not 0, leaves parameters and momentum as they are, bit for bit, whatever the gradients hold. There is never more
    than one matrix and its momentum kept aside for that.
    """

    # torch's name for an optimizer that honours `found_inf` and `grad_scale` by itself.
    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(parameter, group, skip, scale)
        finally:
            self.param_groups = groups
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any], skip: Tensor | None, scale: Tensor | None) -> None:
        assert parameter.grad is not None
        if scale is not None:
            parameter.grad.div_(scale)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        updated = (parameter, state["momentum_buffer"])
        before = [] if skip is None else [tensor.clone() for tensor in updated]
        self.param_groups = [{**group, "params": [parameter]}]
        super().step()  # type: ignore[no-untyped-call]
        if skip is not None:
            for tensor, kept in zip(updated, before, strict=True):
                tensor.copy_(torch.where(skip != 0, kept, tensor))
