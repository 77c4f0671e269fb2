"""The guard against non-finite steps: it decides on the device, and reads back only when asked."""

from __future__ import annotations

import torch

from truthgpt.errors import NonFiniteError


class NonFiniteGuard:
    """Judges every step's loss and gradient norm, and counts the steps that must not be taken.

    Args:
        max_consecutive_skips: non-finite steps in a row that `check` lets pass.
        device: where the counters live.
    """

    def __init__(self, max_consecutive_skips: int, device: torch.device) -> None:
        self._limit = max_consecutive_skips
        self._in_a_row = torch.zeros((), device=device)
        self._longest = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)

    def judge(self, loss_sum: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """1.0 when the step must be skipped, else 0.0 (0-d float32 on the device, no host sync)."""
        skip = (~(torch.isfinite(loss_sum) & torch.isfinite(grad_norm))).float()
        self._total += skip
        self._in_a_row = (self._in_a_row + 1) * skip
        self._longest = torch.maximum(self._longest, self._in_a_row)
        return skip

    def skipped(self) -> int:
        """The steps skipped so far; waits for the device."""
        return int(self._total)

    def check(self) -> None:
        """Read the counters back.

        Raises:
            NonFiniteError: more than `max_consecutive_skips` steps in a row were not finite.
        """
        if int(self._longest) > self._limit:
            raise NonFiniteError(
                f"the loss or gradient was not finite for more than {self._limit} steps in a row "
                f"(guards.max_consecutive_skips); none of them changed the weights. Lower training.learning_rate, "
                f"raise training.warmup_ratio, or find the operation with training.detect_anomaly=true"
            )

    def state_dict(self) -> dict[str, int]:
        """The counters as plain numbers."""
        return {"in_a_row": int(self._in_a_row), "total": int(self._total)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self._in_a_row.fill_(state["in_a_row"])
        self._longest.fill_(state["in_a_row"])
        self._total.fill_(state["total"])
