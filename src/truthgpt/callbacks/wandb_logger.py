"""The callback `wandb`: Weights & Biases."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from truthgpt.callbacks.base import StateView
from truthgpt.callbacks.figures import eval_figures, train_figures

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 5.0
"""How long the server may take to answer before the run is recorded offline instead."""

_EXIT_CODES = {"complete": 0, "failed": 1, "preempted": 143}


class WandbLogger:
    """Sends `train/*` and `eval/*` figures and samples to W&B, at the trainer's own steps.

    A resumed run goes on under the id it had. Without an answer from the server, or without a login, the run is
    recorded offline with one line that says how to upload it. WANDB_MODE and the other variables of W&B are honoured.
    """

    def __init__(self) -> None:
        self._id = secrets.token_hex(8)
        self._run: Any = None

    def state_dict(self) -> dict[str, str]:
        """The run's id."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Take over the id of the run that is resumed; before `on_start`."""
        self._id = state["id"]

    def on_start(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Start the W&B run, or go on with it."""
        Path(info["log_dir"]).mkdir(parents=True, exist_ok=True)  # W&B would fall back to the temporary folder
        try:
            self._run = self._start(info, mode=None)
        except wandb.Error as error:
            reason = str(error).split("\n", 1)[0]
            wandb.teardown()  # its service still holds the id of the run that did not start
            self._run = self._start(info, mode="offline")
            folder = Path(self._run.dir).parent  # `dir` is the folder of uploaded files inside the run's own
            logger.warning("wandb: recording offline, upload later with 'wandb sync %s': %s", folder, reason)
        if not (self._run.offline or self._run.disabled):  # asking those for a URL prints a warning
            logger.info("wandb: %s", self._run.url)

    def _start(self, info: Mapping[str, Any], mode: Literal["offline"] | None) -> Any:
        return wandb.init(
            project=info["project"],
            name=info["run_name"],
            dir=info["log_dir"],
            config=info["config"],
            id=self._id,
            resume="allow",
            mode=mode,
            # console: the run has a log of its own, and capturing stderr tears the progress bar.
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )

    def on_log(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Send the figures of a log line."""
        self._run.log(train_figures(info), step=info["step"])

    def on_eval(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Send loss, metrics and samples of an evaluation."""
        row: dict[str, Any] = dict(eval_figures(info))
        if info["samples"]:
            rows = [[sample["prompt"], sample["text"]] for sample in info["samples"]]
            row["eval/samples"] = wandb.Table(columns=["prompt", "text"], data=rows)
        self._run.log(row, step=info["step"])

    def on_end(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Send what is left and close the run, marked with how it ended."""
        self._run.finish(exit_code=_EXIT_CODES[info["status"]])
