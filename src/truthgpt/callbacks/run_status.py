"""Keeps `status.json` of the run directory true; every run has it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from truthgpt.callbacks.base import StateView
from truthgpt.errors import EXIT_OK, RunDirectoryError, TruthGPTError
from truthgpt.runtime.run_directory import RunDirectory, RunStatus

logger = logging.getLogger(__name__)

RunState = Literal["running", "complete", "preempted", "failed"]


class RunStatusKeeper:
    """Writes the state of the run at its start, at every checkpoint and at its end.

    Args:
        run: the claimed run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._exit_code = EXIT_OK
        self._message: str | None = None

    def on_start(self, state: StateView, info: Mapping[str, Any]) -> None:
        """The run is going."""
        self._write(state, "running", None)

    def on_checkpoint(self, state: StateView, info: Mapping[str, Any]) -> None:
        """The run has come to here, and would go on from here."""
        self._write(state, "running", None)

    def on_exception(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Remember why the run ends."""
        error = info["error"]
        self._exit_code = error.exit_code if isinstance(error, TruthGPTError) else 1
        self._message = str(error) or type(error).__name__

    def on_end(self, state: StateView, info: Mapping[str, Any]) -> None:
        """The run is over."""
        self._message = self._message or info["stop_reason"]
        self._write(state, info["status"], self._exit_code)

    def _write(self, state: StateView, name: RunState, exit_code: int | None) -> None:
        status = RunStatus(
            name, state.step, state.max_steps, state.best_metric, state.best_step, exit_code, self._message
        )
        try:
            self._run.write_status(status)
        except RunDirectoryError as error:  # a full disk now may have room again at the next checkpoint
            logger.warning("status.json is out of date: %s", error)
