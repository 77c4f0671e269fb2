"""SCHEDULERS: the learning rate over the steps of a run.

A builder returns a callable from the step (from 0) to a factor on the peak learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from truthgpt.factories.registry import NoOptions, Options, Registry

SCHEDULERS = Registry("scheduler", runtime=("total_steps", "warmup_steps"))

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share between 0 and 1, both included."""


class DecayOptions(Options):
    """Options of a schedule that decays over the whole run."""

    min_ratio: Ratio = 0.0
    """Factor on the peak learning rate that the decay reaches at the end."""


class WSDOptions(Options):
    """Options of `wsd`."""

    decay_ratio: Ratio = 0.2
    """Share of all steps, the last ones, over which the learning rate decays."""
    min_ratio: Ratio = 0.0
    """Factor on the peak learning rate that the decay reaches at the end."""


@SCHEDULERS.register("cosine", options=DecayOptions)
def build_cosine(total_steps: int, warmup_steps: int, min_ratio: float) -> Callable[[int], float]:
    """Half a cosine from the peak to `min_ratio`."""
    from truthgpt.optim.schedules import cosine

    return cosine(total_steps, warmup_steps, min_ratio)


@SCHEDULERS.register("linear", options=DecayOptions)
def build_linear(total_steps: int, warmup_steps: int, min_ratio: float) -> Callable[[int], float]:
    """A straight line from the peak to `min_ratio`."""
    from truthgpt.optim.schedules import linear

    return linear(total_steps, warmup_steps, min_ratio)


@SCHEDULERS.register("constant", options=NoOptions)
def build_constant(total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The peak learning rate after the warm-up."""
    from truthgpt.optim.schedules import constant

    return constant(total_steps, warmup_steps)


@SCHEDULERS.register("wsd", options=WSDOptions)
def build_wsd(total_steps: int, warmup_steps: int, decay_ratio: float, min_ratio: float) -> Callable[[int], float]:
    """Warm-up, stable, decay: the peak for most of the run, then a straight line to `min_ratio`."""
    from truthgpt.optim.schedules import wsd

    return wsd(total_steps, warmup_steps, decay_ratio, min_ratio)
