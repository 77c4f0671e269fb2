"""Averages of the weights: an exponential moving one, with warm-up, or the one that the optimizer itself keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


class WeightAverage(Protocol):
    """An average of the weights, or none."""

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (counted from 1)."""
        ...

    def applied(self) -> Any:
        """Context in which the model holds the averaged weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, for a checkpoint; empty where none is kept."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class EMA:
    """float32 average of the trainable weights; decay at step t = min(decay, (1 + t) / (10 + t)).

    Without the warm-up a short run would still evaluate its random start.

    Args:
        decay: the decay a step that the warm-up rises to.
        exact: gives the float32 copy that stands behind a weight in half precision, or the weight itself.
        device: where the average is kept; None: where the weights are. From elsewhere every update copies it to the
            weights, a tensor at a time, and back.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        exact: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
        device: torch.device | None = None,
    ) -> None:
        self.device = device
        self._decay = decay
        self._exact = exact
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: self._copied(p) for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weights; one fused call where the average is with the weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        if self.device is None:
            weights = [self._exact(weight).detach().float() for weight in self._weights.values()]
            torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)
            return
        for weight, average in zip(self._weights.values(), self._average.values(), strict=True):
            # Where the weight is: a GPU and its bus are many times as fast as the host's cores. Nothing waits here.
            near = average.to(weight.device, non_blocking=True)
            average.copy_(near.lerp_(self._exact(weight).detach().float(), 1 - decay), non_blocking=True)

    def applied(self) -> AbstractContextManager[None]:
        """The averaged weights stand in the model, float32 ones without a copy; then its own again."""
        if self.device is None:
            return _exchanged(self._weights, self._average)
        return _copied_in(self._weights, self._average, self.device)

    def _copied(self, weight: torch.Tensor) -> torch.Tensor:
        average = weight.detach().to(self.device or weight.device, torch.float32, copy=True)
        # Page-locked, a copy from a GPU is several times as fast.
        return average.pin_memory() if weight.is_cuda and not average.is_cuda else average

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights by parameter name."""
        if self.device is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # the last update may still be on its way to the host
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy saved averages in; KeyError names a parameter the state lacks."""
        for name, average in self._average.items():
            average.copy_(state[name])


@runtime_checkable
class KeepsAverage(Protocol):
    """An optimizer that averages the weights itself."""

    def averaged(self, parameter: torch.Tensor) -> torch.Tensor:
        """The average of `parameter`, of its shape."""
        ...


class OptimizerAverage:
    """The average that the optimizer keeps, for evaluation and the final model; what is trained stays as it is.

    It is made of the weights and the optimizer's state: there is nothing to update, and nothing to restore.
    """

    def __init__(self, model: nn.Module, optimizer: KeepsAverage) -> None:
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = optimizer

    def update(self, step: int) -> None:
        """Nothing to do."""

    def applied(self) -> AbstractContextManager[None]:
        """The averaged weights stand in the model, as a copy; then its own again."""
        return _exchanged(self._weights, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights by parameter name."""
        return {name: self._optimizer.averaged(weight) for name, weight in self._weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class NoEMA:
    """The null average: evaluation uses the weights as they are."""

    def update(self, step: int) -> None:
        """Nothing to do."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model as it is."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load; a checkpoint of a run with EMA simply drops its average."""


@contextmanager
def _copied_in(
    weights: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor], device: torch.device
) -> Iterator[None]:
    """`values` of another device are copied into `weights`, whose own wait on `device`: nothing more is held beside
    the model."""
    own = {name: weight.detach().to(device, copy=True) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data.copy_(values[name])
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(own[name])


@contextmanager
def _exchanged(weights: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`values` stand in `weights`, by exchange of storage; then their own again, bit for bit."""
    own = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = values[name].to(weight.dtype)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data = own[name]
