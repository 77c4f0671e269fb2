"""AdamW that needs no schedule (Defazio et al. 2024, "The Road Less Scheduled", arXiv 2405.15682), by schedulefree.

It is an extra: this module is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import schedulefree
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

_PROGRESS = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
"""What the library keeps in a parameter group that is no setting of it."""


class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):  # type: ignore[misc]
    """schedulefree's AdamWScheduleFree, whose average can be asked for at any time.

    Gradients are taken at y, the weights of the model; the state holds z, where plain AdamW would be; what has learnt
    is their average x, y = beta1 * x + (1 - beta1) * z. The library goes from y to x and back in place, which rounds:
    looking at x would change the run. Here the weights stay y, and `averaged` gives x as a copy.

    Args:
        params: parameters or parameter groups, float32.
        lr: learning rate; constant, or rising in a warm-up, whose steps weigh less in the average.
        betas: share of x in y, above 0, and decay rate of the average of the squared gradient.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, at y.
    """

    def __init__(self, params: ParamsT, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._beta1 = betas[0]
        self.train()
        self._progress = self._take_progress()

    def averaged(self, parameter: Tensor) -> Tensor:
        """x, a new tensor; the parameter itself before its first step."""
        z: Tensor | None = self.state.get(parameter, {}).get("z")
        return parameter.detach() if z is None else torch.lerp(parameter.detach(), z, 1.0 - 1.0 / self._beta1)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; gradients are written over.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.
        """
        with self._progress_in_groups():
            loss: float | None = super().step(closure)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the groups hold the progress too."""
        with self._progress_in_groups():
            state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of other parameter groups, or of another beta1, of which the weights are made.
        """
        for group in state_dict["param_groups"]:
            if group["betas"][0] != self._beta1:
                raise ValueError(f"its weights are made with betas[0] {group['betas'][0]}, not {self._beta1}")
        super().load_state_dict(dict(state_dict))
        self._progress = self._take_progress()

    @contextmanager
    def _progress_in_groups(self) -> Iterator[None]:
        """The groups as the library knows them. Elsewhere they hold settings alone, which a resumed run may change."""
        for group, progress in zip(self.param_groups, self._progress, strict=True):
            group.update(progress)
        try:
            yield
        finally:
            self._progress = self._take_progress()

    def _take_progress(self) -> list[dict[str, Any]]:
        return [{name: group.pop(name) for name in _PROGRESS} for group in self.param_groups]
