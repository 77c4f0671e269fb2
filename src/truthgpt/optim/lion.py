"""The Lion optimizer (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay; one state tensor a parameter.

    With gradient g, momentum m, parameter p and weight decay w, one step is::

        p = p - lr * (sign(beta1 * m + (1 - beta1) * g) + w * p)
        m = beta2 * m + (1 - beta2) * g

    Like torch's fused AdamW it takes part in loss scaling without a host sync: `step` divides the gradients by the
    attribute `grad_scale` and, where the attribute `found_inf` (one float element on the device) is not 0, leaves
    parameters and momentum as they are, bit for bit, whatever the gradients hold.

    Args:
        params: parameters or parameter groups, real floating point.
        lr: learning rate; about a tenth of AdamW's, since every element moves by all of it.
        betas: interpolation for the update (beta1) and decay of the momentum (beta2), both in [0, 1).
        weight_decay: decoupled weight decay; about ten times AdamW's for the same effect.

    Raises:
        ValueError: an argument is out of range.
    """

    # torch's name for an optimizer that honours `found_inf` and `grad_scale` by itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"lr must be at least 0, not {lr}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must both be in [0, 1), not {betas}")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for (device, _), parameters in self._buckets(group["params"]).items():
                self._update(
                    parameters,
                    group,
                    skip=None if found_inf is None else found_inf.to(device, non_blocking=True).reshape(()) != 0,
                    grad_scale=None if grad_scale is None else grad_scale.to(device, non_blocking=True).reshape(()),
                )
        return loss

    @staticmethod
    def _buckets(parameters: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
        """Parameters with a gradient by device and dtype; foreach kernels are fast on lists of one kind only."""
        buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError("Lion takes no sparse gradients; build the embedding with sparse=False")
            buckets[parameter.device, parameter.dtype].append(parameter)
        return buckets

    def _update(
        self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, grad_scale))
        momenta = [self._momentum(parameter) for parameter in parameters]

        update = list(torch._foreach_mul(momenta, beta1))
        torch._foreach_add_(update, gradients, alpha=1.0 - beta1)
        torch._foreach_sign_(update)
        if group["weight_decay"] != 0.0:
            torch._foreach_add_(update, parameters, alpha=group["weight_decay"])
        _subtract(parameters, update, scale=group["lr"], skip=skip)
        del update  # frees a copy of the parameters before the next one is made

        # m - (1 - beta2) * (m - g) is beta2 * m + (1 - beta2) * g, written as one difference that can be masked.
        _subtract(momenta, list(torch._foreach_sub(momenta, gradients)), scale=1.0 - beta2, skip=skip)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum: Tensor = state["exp_avg"]
        return momentum


def _subtract(targets: list[Tensor], differences: list[Tensor], scale: float, skip: Tensor | None) -> None:
    """targets -= scale * differences in place, or nothing at all where `skip` is true; `differences` is consumed.

    Masking the difference works where multiplying by 0 does not (0 * NaN is NaN), and x - (+0.0) has the bits of x
    for every x, -0.0 included.
    """
    if skip is not None:
        for difference in differences:
            difference.masked_fill_(skip, 0.0)
    torch._foreach_add_(targets, differences, alpha=-scale)
