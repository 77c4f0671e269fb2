"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass, for weights in float32 or in bf16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from truthgpt.optim.adamw_step import Slot, Step

if TYPE_CHECKING:
    from truthgpt.optim.adamw_kernel import Tables

Rounding = Literal["master", "stochastic"]


class AdamW(torch.optim.Optimizer):
    """AdamW whose averages are float32, whatever the type of the weights.

    On a GPU all parameters are updated by one Triton kernel, which also clips (`grad_scale`), skips (`found_inf`) and
    rounds; elsewhere by PyTorch's operations. The attributes are those of torch's own fused AdamW: `step` divides the
    gradients by `grad_scale` and, where `found_inf` (one float element on the device) is not 0, leaves parameters and
    state as they are, bit for bit, whatever the gradients hold. Gradients are not written to.

    Weights in bf16 lose updates smaller than a 256th of themselves. Either a float32 copy takes them (`master`, kept
    in the state: 16 bytes a parameter with a bf16 gradient), or they are rounded up or down at random, in proportion to
    the distance, so that they are right in the mean (`stochastic`: 12 bytes; Zamirai et al. 2020, arXiv 2010.06192).

    Args:
        params: parameters or parameter groups, float32 or bf16.
        lr: learning rate.
        betas: decay rates of the averages of the gradient and of its square, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        rounding: how bf16 parameters are kept; float32 ones need none.
        seed: of stochastic rounding, which depends on it, the step and the place of a weight only.

    Raises:
        ValueError: an argument is out of range.
    """

    # torch's name for an optimizer that honours `found_inf` and `grad_scale` by itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rounding: Rounding = "master",
        seed: int = 0,
    ) -> None:
        if lr < 0.0 or eps < 0.0 or weight_decay < 0.0:
            raise ValueError(f"lr, eps and weight_decay must be at least 0, not {lr}, {eps}, {weight_decay}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must both be in [0, 1), not {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._rounding = rounding
        self._seed = seed
        self._tables: dict[int, Tables] = {}  # by parameter group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: a gradient is sparse, or a parameter not contiguous.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for index, group in enumerate(self.param_groups):
            slots = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    slots.append(self._slot(parameter, place))
                place += parameter.numel()
            if slots:
                self._update(slots, group, index)
        return loss

    def _update(self, slots: list[Slot], group: dict[str, Any], group_index: int) -> None:
        device = slots[0].parameter.device
        skip: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        skip = torch.zeros((), device=device) if skip is None else skip.to(device).reshape(())
        scale = torch.ones((), device=device) if scale is None else scale.to(device).reshape(())
        steps = [slot.step for slot in slots]
        torch._foreach_add_(steps, [1.0 - skip] * len(steps))  # a skipped step does not count
        beta1, beta2 = group["betas"]
        # In float64: 1 - beta2 ** step begins at 0.001 and would lose digits that float32 does not have to spare.
        # Every parameter counts its own steps: an expert that no token reached has no gradient, and takes none.
        exact = torch.stack(steps).double()
        corrections = torch.stack([1.0 - beta1**exact, (1.0 - beta2**exact).sqrt()]).float()
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        stochastic = self._rounding == "stochastic"
        step = Step(
            **numbers,
            beta1=beta1,
            beta2=beta2,
            corrections=corrections,
            skip=skip,
            scale=scale,
            stochastic=stochastic,
            noise_seed=self._seed % 2**31,
        )
        if device.type == "cuda":
            from truthgpt.optim.adamw_kernel import Tables, update

            update(slots, step, self._tables.setdefault(group_index, Tables()))
        else:
            for slot, corrections in zip(slots, step.corrections.unbind(1), strict=True):
                _update_one(slot, step, corrections)

    def _slot(self, parameter: Tensor, place: int) -> Slot:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse or not parameter.is_contiguous():
            raise RuntimeError("AdamW takes dense gradients (an embedding with sparse=False) of contiguous parameters")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        if parameter.dtype != torch.float32 and self._rounding == "master" and "master" not in state:
            state["master"] = parameter.detach().float()
        averages = state["exp_avg"], state["exp_avg_sq"]
        return Slot(parameter, gradient.contiguous(), *averages, state.get("master"), state["step"], place)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, its tensors in their own types: torch would make them those of the weights.

        Raises:
            ValueError: the state is of other parameter groups.
        """
        super().load_state_dict(dict(state_dict))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                kept = value.detach().clone().to(parameter.device)
                self.state[parameter][name] = kept.float().reshape(()) if name == "step" else kept


def float32_copy(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The float32 weights that stand behind a bf16 parameter; the parameter itself where there are none (yet)."""
    state = optimizer.state.get(parameter, {})
    copy: Tensor = state.get("master", parameter)
    return copy


def _update_one(slot: Slot, step: Step, corrections: Tensor) -> None:
    """The kernel's update by PyTorch's operations."""
    weights = slot.parameter if slot.master is None else slot.master
    values = weights.float()
    gradient = slot.gradient.float() / step.scale
    exp_avg = torch.lerp(slot.exp_avg, gradient, 1.0 - step.beta1)
    exp_avg_sq = slot.exp_avg_sq * step.beta2 + gradient.square() * (1.0 - step.beta2)
    denominator = exp_avg_sq.sqrt() / corrections[1] + step.eps
    updated = values * (1.0 - step.lr * step.weight_decay) - step.lr / corrections[0] * exp_avg / denominator
    keep = step.skip != 0
    for target, value in ((slot.exp_avg, exp_avg), (slot.exp_avg_sq, exp_avg_sq)):
        target.copy_(torch.where(keep, target, value))
    if step.stochastic and weights.dtype == torch.bfloat16:
        updated = round_stochastically(updated, hash((step.noise_seed, int(slot.step), slot.place)) % 2**63)
    weights.copy_(torch.where(keep, weights, updated.to(weights.dtype)))
    if slot.master is not None:
        slot.parameter.copy_(torch.where(keep, slot.parameter, slot.master.to(slot.parameter.dtype)))


def round_stochastically(values: Tensor, seed: int) -> Tensor:
    """bf16 neighbours of float32 `values`, each taken with a probability of the distance to the other.

    A bf16 number is the upper half of a float32 one: a random number added to the lower half carries over into the
    upper one as often as the value is far from it.
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = (values.view(torch.int32) + noise) & -(2**16)
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).bfloat16()
