"""The eight callback hooks and their dispatcher."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

logger = logging.getLogger(__name__)

HOOKS = ("on_start", "on_step", "on_log", "on_eval", "on_checkpoint", "on_epoch", "on_exception", "on_end")
"""Every hook is called as `hook(state, info)`: a read-only view of the run and a mapping of plain values."""


class StateView(Protocol):
    """What a hook may read of where the run stands; all of it plain values, nothing on the device."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def max_steps(self) -> int:
        """Optimizer steps the run is made of."""
        ...

    @property
    def epoch(self) -> int:
        """Passes over the training data done."""
        ...

    @property
    def tokens(self) -> int:
        """Supervised tokens trained on."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Steps left out because their loss or gradient was not finite."""
        ...

    @property
    def best_metric(self) -> float | None:
        """Best value so far of the metric the best checkpoint is chosen by."""
        ...

    @property
    def best_step(self) -> int | None:
        """Step of `best_metric`."""
        ...

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends before `max_steps`, if it does."""
        ...

    @property
    def wall_time_s(self) -> float:
        """Seconds trained, over all resumes."""
        ...


class CallbackList:
    """Calls every callback that has the hook, in order; one that fails is reported once and left out from then on.

    A callback is any object with any subset of `HOOKS`, and optionally `state_dict` and `load_state_dict`; the state
    is given back before `on_start`.
    """

    def __init__(self, callbacks: Sequence[tuple[str, object]]) -> None:
        self._callbacks = list(callbacks)

    def call(self, hook: str, state: StateView, info: Mapping[str, Any]) -> None:
        """Call `hook` on every callback. Never raises: a failing tracker must not end a run."""
        for name, callback in list(self._callbacks):
            self._try(name, callback, hook, state, info)

    def state_dict(self) -> dict[str, Any]:
        """State of the callbacks that keep one, by name. A failing one is left out, so that the run can be saved."""
        states = {name: self._try(name, callback, "state_dict") for name, callback in list(self._callbacks)}
        return {name: state for name, state in states.items() if state is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every callback its saved state back; one that is new keeps its fresh state."""
        for name, callback in list(self._callbacks):
            if name in state:
                self._try(name, callback, "load_state_dict", state[name])

    def _try(self, name: str, callback: object, method_name: str, *arguments: object) -> Any:
        method = getattr(callback, method_name, None)
        if method is None:
            return None
        try:
            return method(*arguments)
        except Exception as error:  # noqa: BLE001 - the one dispatcher that may catch everything
            self._callbacks = [entry for entry in self._callbacks if entry[1] is not callback]
            logger.warning("callback %s failed in %s and is off from now on: %r", name, method_name, error)
            return None
