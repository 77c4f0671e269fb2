"""The callback `tensorboard`: event files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from truthgpt.callbacks.base import StateView
from truthgpt.callbacks.figures import eval_figures, train_figures


class TensorBoardLogger:
    """Writes `train/*` and `eval/*` scalars and the samples under `<log_dir>/<run_name>`."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Open the event file; a resumed run hides what an interrupted one wrote after the step resumed from."""
        folder = Path(info["log_dir"]) / info["run_name"]
        resumed_step = info["resumed_step"]
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)

    def on_log(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Write the figures of a log line."""
        self._write(train_figures(info), info["step"])

    def on_eval(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Write loss, metrics and samples of an evaluation."""
        self._write(eval_figures(info), info["step"])
        if self._writer is not None:
            for index, sample in enumerate(info["samples"]):
                # Indented by four: a code block in TensorBoard's Markdown.
                text = (sample["prompt"] + sample["text"]).replace("\n", "\n    ")
                self._writer.add_text(f"samples/{index}", f"    {text}", info["step"])

    def on_checkpoint(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Bring the event file up to the checkpoint, so that a run killed later loses nothing before it."""
        if self._writer is not None:
            self._writer.flush()

    def on_exception(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Close the event file."""
        self._close()

    def on_end(self, state: StateView, info: Mapping[str, Any]) -> None:
        """Close the event file."""
        self._close()

    def _write(self, figures: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
