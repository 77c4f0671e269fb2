"""Forward and backward of one micro-batch: as they are, or recorded once and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from truthgpt.data.base import Batch
from truthgpt.errors import ConfigError, Problem
from truthgpt.runtime.cuda_graph import CaptureError, MemoryPool, recording

Backward = Callable[[Batch, "int | torch.Tensor"], torch.Tensor]
"""`(micro-batch on the device, supervised tokens of the global batch) -> loss sum (0-d)`; adds to the gradients."""

EAGER_CALLS = 3
"""Calls before a graph is recorded: kernels are compiled and chosen in the first ones, which a graph cannot hold."""


class MicroStep(Protocol):
    """Computes micro-batches; gradients add up from one with `first` on."""

    def __call__(self, batch: Batch, tokens: int, first: bool) -> torch.Tensor:
        """Loss sum of a micro-batch (0-d), valid until the next call; its gradients are added to the parameters'.

        Args:
            batch: on the CPU.
            tokens: supervised tokens of the global batch.
            first: whether it is the first of an optimizer step.
        """
        ...

    def clear(self) -> None:
        """Forget the gradients, after the optimizer step."""
        ...


class EagerMicroStep:
    """Operation by operation.

    Args:
        backward: computes one micro-batch.
        parameters: whose gradients it adds to.
        device: where it computes.
    """

    def __init__(self, backward: Backward, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        self._backward = backward
        self._parameters = parameters
        self._device = device

    def __call__(self, batch: Batch, tokens: int, first: bool) -> torch.Tensor:
        """See `MicroStep`."""
        del first
        # Asynchronous from pinned memory.
        on_device = {key: tensor.to(self._device, non_blocking=True) for key, tensor in batch.items()}
        return self._backward(on_device, tokens)

    def clear(self) -> None:
        """See `MicroStep`."""
        for parameter in self._parameters:
            parameter.grad = None


class GraphedMicroStep:
    """Replays forward and backward as one CUDA graph, so that launching their kernels costs the CPU nothing.

    The first calls, and micro-batches of another shape than the first one's, are computed operation by operation. Two
    graphs are recorded, one that writes the gradients and one that adds to them; both compute in one pool of memory,
    which holds a step's activations for the rest of the run. Dropout draws what it would draw without a graph: the
    generator's seed is read at every replay.

    Args:
        eager: computes what no graph does.
        backward, parameters, device: as for `EagerMicroStep`.
    """

    def __init__(
        self, eager: EagerMicroStep, backward: Backward, parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self._eager = eager
        self._backward = backward
        self._parameters = parameters
        self._calls = 0
        self._inputs: Batch = {}
        self._tokens = torch.ones((), device=device)
        self._write: _Graph | None = None
        self._add: _Graph | None = None
        self._gradients: list[torch.Tensor | None] = []

    def __call__(self, batch: Batch, tokens: int, first: bool) -> torch.Tensor:
        """See `MicroStep`."""
        self._calls += 1
        if self._calls == 1:
            self._inputs = {key: torch.empty_like(tensor, device=self._tokens.device) for key, tensor in batch.items()}
        if self._calls <= EAGER_CALLS or not self._fits(batch) or not (first or self._holds_gradients()):
            return self._eager(batch, tokens, first)
        for key, tensor in batch.items():
            self._inputs[key].copy_(tensor, non_blocking=True)
        self._tokens.fill_(tokens)
        return self._first() if first else self._further()

    def clear(self) -> None:
        """See `MicroStep`; the graphs keep the memory of the gradients."""
        self._eager.clear()

    def _first(self) -> torch.Tensor:
        if self._write is None:
            torch.cuda.empty_cache()  # what the eager calls used is of no use to the graphs' own pool
            self._eager.clear()
            self._write = _Graph(lambda: self._backward(self._inputs, self._tokens), pool=None)
            self._gradients = [parameter.grad for parameter in self._parameters]
        loss = self._write.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _further(self) -> torch.Tensor:
        assert self._write is not None  # it wrote the gradients that this call adds to
        if self._add is None:
            self._add = _Graph(lambda: self._backward(self._inputs, self._tokens), pool=self._write.pool)
        return self._add.replay()

    def _fits(self, batch: Batch) -> bool:
        return batch.keys() == self._inputs.keys() and all(
            tensor.shape == self._inputs[key].shape for key, tensor in batch.items()
        )

    def _holds_gradients(self) -> bool:
        """Whether the parameters' gradients are those that the first graph wrote."""
        pairs = zip(self._parameters, self._gradients, strict=False)
        return bool(self._gradients) and all(parameter.grad is gradient for parameter, gradient in pairs)


class _Graph:
    """A recorded computation and the loss it leaves.

    Raises:
        ConfigError: it cannot be recorded.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], pool: MemoryPool | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        try:
            with recording(self._graph, self.pool):
                self._loss = compute()
        except CaptureError as error:
            message = f"reduce-overhead replays forward and backward, and {error}"
            hint = "set it to default; the last checkpoint is untouched"
            problem = Problem(key="training.compile_mode", message=message, suggestion=hint)
            raise ConfigError([problem]) from error

    def replay(self) -> torch.Tensor:
        """Compute, on the inputs as they are now."""
        self._graph.replay()
        return self._loss
