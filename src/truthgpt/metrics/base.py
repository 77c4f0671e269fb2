"""What a metric is: sums that stream, so that evaluation never keeps logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class EvalBatch:
    """What one evaluated batch gives to the metrics; all tensors live on the model's device.

    `loss_sum` is the summed cross-entropy in nats over `tokens` supervised positions (both 0-d); `labels` is `(B, T)`
    with -100 where nothing is supervised.
    """

    loss_sum: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    compute_logits: Callable[[], torch.Tensor]

    @cached_property
    def logits(self) -> torch.Tensor:
        """`(B, T, V)`; computed when a metric first asks: a large vocabulary's take more memory than the model."""
        return self.compute_logits()


class Metric(Protocol):
    """A number computed over a whole evaluation; `direction` says whether a smaller or a larger one is better."""

    name: str
    direction: Literal["min", "max"]

    def reset(self) -> None:
        """Forget everything."""
        ...

    def update(self, batch: EvalBatch) -> None:
        """Take in one batch, without reading anything back from the device."""
        ...

    def compute(self) -> float:
        """The value over all batches since `reset`; NaN without any token."""
        ...
