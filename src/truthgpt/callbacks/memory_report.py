"""Says once how far the planned peak of memory was off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from truthgpt.callbacks.base import StateView

logger = logging.getLogger(__name__)


class MemoryReport:
    """A line with the first log line of a GPU's run that has two steps behind it: the optimizer's state, which the
    first step makes, is there from the second on.

    Args:
        predicted_bytes: peak of a step as planned.
    """

    def __init__(self, predicted_bytes: int) -> None:
        self._predicted_bytes = predicted_bytes
        self._said = False

    def on_log(self, state: StateView, info: Mapping[str, Any]) -> None:
        """See `callbacks.base`."""
        if self._said or state.step < 2 or "peak_memory_bytes" not in info:
            return
        self._said = True
        peak = info["peak_memory_bytes"]
        logger.info(
            "memory: peak %.2f GiB, %.2f GiB planned (%+.1f%%)",
            *(peak / 2**30, self._predicted_bytes / 2**30, 100 * (self._predicted_bytes / peak - 1)),
        )
