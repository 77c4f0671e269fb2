"""What happened since the last log line: loss on the device, tokens and seconds on the host."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from truthgpt.trainers.engine import StepScalars


@dataclass(frozen=True)
class Speed:
    """Model arithmetic and hardware peak, for model FLOPs utilisation; None where unknown."""

    flops_per_token: float | None = None
    peak_flops: float | None = None


class StepMeter:
    """Gathers steps until a log line reads them.

    Loss sum and token count are part of the checkpoint, so that a resumed run logs the same losses; speed is not.
    """

    def __init__(self, device: torch.device, speed: Speed) -> None:
        precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self._loss_sum = torch.zeros((), dtype=precise, device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._loss_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._window_tokens = 0
        self._window_start_s = time.perf_counter()
        self._speed = speed

    def add(self, scalars: StepScalars, tokens: int) -> None:
        """Take in one step, without reading anything back.

        A step whose loss is not finite counts as skipped, not into the mean; a window of nothing else reads NaN.
        """
        finite = torch.isfinite(scalars.loss_sum)
        self._loss_sum += torch.where(finite, scalars.loss_sum, 0.0)
        self._loss_tokens += finite * tokens
        self._grad_norm = scalars.grad_norm
        self._window_tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this context (evaluation, saving, sampling) does not count against the speed of training."""
        start_s = time.perf_counter()
        yield
        self._window_start_s += time.perf_counter() - start_s

    def read(self) -> dict[str, float]:
        """Loss, gradient norm and speed since the last `read`; starts a new window. Waits for the device."""
        loss_tokens = int(self._loss_tokens)
        row = {
            "loss": float(self._loss_sum) / loss_tokens if loss_tokens else float("nan"),
            "grad_norm": float(self._grad_norm),
        }
        now_s = time.perf_counter()
        row["tokens_per_sec"] = self._window_tokens / max(now_s - self._window_start_s, 1e-9)
        if self._speed.flops_per_token and self._speed.peak_flops:
            row["mfu"] = row["tokens_per_sec"] * self._speed.flops_per_token / self._speed.peak_flops
        self._loss_sum.zero_()
        self._loss_tokens.zero_()
        self._window_tokens = 0
        self._window_start_s = now_s
        return row

    def restart_clock(self) -> None:
        """Start the speed window now, after setting up."""
        self._window_start_s = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Loss sum and token count since the last log line, and the last gradient norm (None when it is not finite)."""
        grad_norm = float(self._grad_norm)
        return {
            "loss_sum": self._loss_sum.cpu(),
            "loss_tokens": int(self._loss_tokens),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._loss_sum.copy_(state["loss_sum"])
        self._loss_tokens.fill_(state["loss_tokens"])
        grad_norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        self._grad_norm = torch.full_like(self._grad_norm, grad_norm)
