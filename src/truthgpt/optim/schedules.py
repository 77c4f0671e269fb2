"""Learning-rate schedules as pure functions of the step: resuming needs nothing but the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate at every step 0 ... total_steps - 1.

    With N = total_steps, W = warmup_steps and D = decay_steps, the last D of the run:

    - `step < W`: `(step + 1) / W`, so the first step trains at 1 / W of the peak and step W - 1 at all of it;
    - else `min_ratio + (1 - min_ratio) * shape(progress)`, `progress = clamp((step - (N - D)) / D, 0, 1)`; 1 if D = 0.

    progress is (D - 1) / D at the last step and reaches 1 only after it: with `min_ratio` 0 the last step still
    trains. Where W >= N the warm-up takes the whole run.
    """

    kind: str
    total_steps: int
    warmup_steps: int
    decay_steps: int
    min_ratio: float
    shape: Callable[[float], float]
    """Falls from 1 to 0 as progress goes from 0 to 1."""

    def factor(self, step: int) -> float:
        """Factor in [0, 1] for the optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        into_decay = step - (self.total_steps - self.decay_steps)
        if into_decay <= 0 or self.decay_steps == 0:
            return 1.0
        progress = min(into_decay / self.decay_steps, 1.0)
        return self.min_ratio + (1.0 - self.min_ratio) * self.shape(progress)

    def __call__(self, step: int) -> float:
        """The same as `factor`: a schedule is a function of the step."""
        return self.factor(step)

    def state_dict(self) -> dict[str, str | int]:
        """What a checkpoint keeps, to tell a run that is resumed with another schedule."""
        return {"kind": self.kind, "total_steps": self.total_steps, "warmup_steps": self.warmup_steps}


def cosine(total_steps: int, warmup_steps: int, min_ratio: float) -> Schedule:
    """Half a cosine from the end of the warm-up to that of the run (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    decay_steps = max(total_steps - warmup_steps, 0)
    return Schedule("cosine", total_steps, warmup_steps, decay_steps, min_ratio, _half_cosine)


def linear(total_steps: int, warmup_steps: int, min_ratio: float) -> Schedule:
    """A straight line from the end of the warm-up to the end of the run."""
    decay_steps = max(total_steps - warmup_steps, 0)
    return Schedule("linear", total_steps, warmup_steps, decay_steps, min_ratio, _straight)


def constant(total_steps: int, warmup_steps: int) -> Schedule:
    """The peak learning rate from the end of the warm-up on."""
    return Schedule("constant", total_steps, warmup_steps, 0, 1.0, _straight)


def wsd(total_steps: int, warmup_steps: int, decay_ratio: float, min_ratio: float) -> Schedule:
    """Warm-up, stable, decay (MiniCPM, Hu et al. 2024, arXiv 2404.06395), with a linear decay.

    The decay takes the last `decay_ratio * total_steps` steps, rounded to the nearest, or what the warm-up leaves.
    """
    decay_steps = min(round(decay_ratio * total_steps), max(total_steps - warmup_steps, 0))
    return Schedule("wsd", total_steps, warmup_steps, decay_steps, min_ratio, _straight)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _straight(progress: float) -> float:
    return 1.0 - progress
