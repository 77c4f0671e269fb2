"""A plugin for tests: a callback that kills its process, without any goodbye, when the environment says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from truthgpt.factories.callbacks import CALLBACKS


class KillSwitch:
    """Sends SIGKILL (or `KILL_SIGNAL`) to this process at the hook and step of `KILL_AT` ("on_step:17")."""

    def _maybe(self, hook: str, state: Any) -> None:
        if os.environ.get("KILL_AT") == f"{hook}:{state.step}":
            os.kill(os.getpid(), getattr(signal, os.environ.get("KILL_SIGNAL", "SIGKILL")))

    def on_step(self, state: Any, info: Mapping[str, Any]) -> None:
        self._maybe("on_step", state)

    def on_log(self, state: Any, info: Mapping[str, Any]) -> None:
        self._maybe("on_log", state)

    def on_eval(self, state: Any, info: Mapping[str, Any]) -> None:
        self._maybe("on_eval", state)

    def on_checkpoint(self, state: Any, info: Mapping[str, Any]) -> None:
        self._maybe("on_checkpoint", state)


@CALLBACKS.register("kill_switch")
def build_kill_switch() -> KillSwitch:
    """Kills the process where `KILL_AT` says."""
    return KillSwitch()
