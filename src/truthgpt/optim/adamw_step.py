"""What one step of AdamW is given, by whichever way it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A parameter with its gradient and state; `place` counts the optimizer's weights before it."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    step: Tensor
    place: int


@dataclass(frozen=True)
class Step:
    """The numbers of one update. `corrections`: 1 - beta1^t and the root of 1 - beta2^t of every slot, float32
    `(2, slots)`; `skip` and `scale` 0-d, on the device like them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    corrections: Tensor
    skip: Tensor
    scale: Tensor
    stochastic: bool
    noise_seed: int
