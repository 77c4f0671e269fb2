"""CALLBACKS: what watches a run. A callback learns about its run in `on_start`, so a builder needs options only."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from truthgpt.factories.registry import Availability, NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.callbacks.print_logger import PrintLogger
    from truthgpt.callbacks.tensorboard_logger import TensorBoardLogger
    from truthgpt.callbacks.wandb_logger import WandbLogger

CALLBACKS = Registry("callback")


def package_installed(package: str) -> bool:
    """Whether `import package` would find a real package; nothing is imported.

    A folder that merely has the name does not count: trackers leave one (`./wandb`) in the working directory, and
    Python would take it for a namespace package.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _tracker_availability(package: str) -> Availability:
    """A tracker that is not installed is replaced by `print`; metrics.jsonl holds its figures all the same."""
    if package_installed(package):
        return Availability(True)
    return Availability(False, f"{package} is not installed: pip install 'truthgpt[{package}]'", fallback="print")


def _probe_tensorboard() -> Availability:
    return _tracker_availability("tensorboard")


def _probe_wandb() -> Availability:
    return _tracker_availability("wandb")


@CALLBACKS.register("print", options=NoOptions)
def build_print() -> PrintLogger:
    """Progress bar on a terminal, plain lines otherwise; on stderr."""
    from truthgpt.callbacks.print_logger import PrintLogger

    return PrintLogger()


@CALLBACKS.register("tensorboard", options=NoOptions, probe=_probe_tensorboard)
def build_tensorboard() -> TensorBoardLogger:
    """TensorBoard event files under `logging.dir`."""
    from truthgpt.callbacks.tensorboard_logger import TensorBoardLogger

    return TensorBoardLogger()


@CALLBACKS.register("wandb", options=NoOptions, probe=_probe_wandb)
def build_wandb() -> WandbLogger:
    """Weights & Biases; offline when its server cannot be reached."""
    from truthgpt.callbacks.wandb_logger import WandbLogger

    return WandbLogger()
