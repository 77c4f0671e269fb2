"""TensorBoard event files and W&B runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.callbacks.facts import end_facts, eval_row, log_row, start_facts, state_at

from truthgpt.callbacks.base import CallbackList
from truthgpt.callbacks.figures import eval_figures, train_figures


def test_figures_are_numbers_only() -> None:
    assert eval_figures({**eval_row(3), "best_metric": None}) == {"eval/val_loss": 1.9, "eval/ppl": 6.6859}
    assert set(train_figures(log_row(3))) == {f"train/{name}" for name in log_row(3)} - {"train/step"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars that TensorBoard would show of `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from truthgpt.callbacks.tensorboard_logger import TensorBoardLogger

    interrupted = TensorBoardLogger()
    interrupted.on_start(state_at(0), start_facts(tmp_path))
    for step in (1, 2, 3):
        interrupted.on_log(state_at(step), log_row(step, loss=float(step)))
    interrupted.on_eval(state_at(3), eval_row(3))
    interrupted.on_exception(state_at(3), {"error": ValueError()})
    interrupted.on_end(state_at(3), end_facts(3, "failed"))

    resumed = TensorBoardLogger()
    resumed.on_start(state_at(2), start_facts(tmp_path, resumed_step=2))
    for step in (3, 4):
        resumed.on_log(state_at(step), log_row(step, loss=10.0 * step))
    resumed.on_checkpoint(state_at(4), {"path": "x", "best": False})
    shown = scalars(tmp_path / "logs" / "small")
    resumed.on_end(state_at(4), end_facts(4))
    assert shown["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert shown["eval/ppl"] == []  # step 3 is not evaluated yet, this time
    assert shown["train/tokens_per_sec"][0][1] == pytest.approx(12345.6)


def test_tensorboard_evaluations_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from truthgpt.callbacks.tensorboard_logger import TensorBoardLogger

    logger = TensorBoardLogger()
    logger.on_start(state_at(0), start_facts(tmp_path))
    logger.on_eval(state_at(5), eval_row(5))
    logger.on_end(state_at(5), end_facts(5))
    folder = tmp_path / "logs" / "small"
    assert scalars(folder)["eval/val_loss"] == [(5, pytest.approx(1.9))]
    events = EventAccumulator(str(folder))
    events.Reload()
    text = events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    def foo():\n        pass"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """W&B with no login and no settings of the machine's owner."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    module.teardown()  # it reads the environment once a process
    yield module
    module.teardown()


def assert_recorded(folder: Path, *names: bytes) -> None:
    """W&B's service writes the file out a moment after `finish`."""
    deadline_s = time.monotonic() + 60
    (file,) = folder.glob("run-*.wandb")
    while not all(name in file.read_bytes() for name in names):
        assert time.monotonic() < deadline_s, f"{names} are not all in {file}"
        time.sleep(0.05)


def test_wandb_without_a_login_records_offline(
    wandb: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from truthgpt.callbacks.wandb_logger import WandbLogger

    logger = WandbLogger()
    callbacks = CallbackList([("wandb", logger)])
    with caplog.at_level(logging.INFO, logger="truthgpt"):
        callbacks.call("on_start", state_at(0), start_facts(tmp_path))
        callbacks.call("on_log", state_at(1), log_row(1))
        callbacks.call("on_eval", state_at(1), eval_row(1))
        callbacks.call("on_end", state_at(1), end_facts(1))
    (folder,) = (tmp_path / "logs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(logger.state_dict()["id"])
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("truthgpt")]
    assert line.startswith(f"wandb: recording offline, upload later with 'wandb sync {folder}': ")
    assert_recorded(folder, b"train/loss", b"eval/ppl")
    assert capfd.readouterr().err == ""  # anything there would tear the progress bar


def test_wandb_run_id_survives_a_resume(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truthgpt.callbacks.wandb_logger import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "disabled")
    first, resumed = WandbLogger(), WandbLogger()
    assert first.state_dict() != resumed.state_dict()
    resumed.load_state_dict(first.state_dict())
    assert first.state_dict() == resumed.state_dict()
    resumed.on_start(state_at(2), start_facts(tmp_path, resumed_step=2))
    assert wandb.run is not None
    resumed.on_end(state_at(2), end_facts(2, "preempted"))
    assert wandb.run is None


def test_wandb_without_its_server_records_offline(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from truthgpt.callbacks import wandb_logger

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT_S", 0.5)
    logger = wandb_logger.WandbLogger()
    start_s = time.monotonic()
    logger.on_start(state_at(0), start_facts(tmp_path))
    assert time.monotonic() - start_s < 80, "its own limit is 90 s"
    logger.on_log(state_at(1), log_row(1))
    logger.on_end(state_at(1), end_facts(1))
    (folder,) = (tmp_path / "logs" / "wandb").glob("offline-run-*")
    assert_recorded(folder, b"train/loss")
    assert "wandb: recording offline" in caplog.text
