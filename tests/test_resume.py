"""Train N = train k, kill -9, resume to N: weights, optimizer, EMA and the loss log, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.process import Cli
from tests.sample_data import BASE, write_sources
from truthgpt.runtime.run_directory import read_status

PLUGIN = ("--plugin", "tests.plugins.kill_switch", "training.callbacks=[print, kill_switch]")
SOURCES = {
    "text": ["data.source=text", "data.path=corpus.txt"],
    "jsonl": ["data.source=jsonl", "data.path=rows.jsonl", "data.validation_fraction=0.1"],
    "jsonl prompt": [
        "data.source=jsonl",
        "data.path=pairs.jsonl",
        "data.format=prompt_completion",
        "data.train_on=completion",
        "data.validation_fraction=0.1",
    ],
    "python_stdlib": ["data.source=python_stdlib", "data.path=null", "data.validation_fraction=0.0005"],
}


def equal(first: Any, second: Any, where: str = "") -> None:
    """Assert that two nested structures are equal bit for bit, naming the first difference."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            equal(a, b, f"{where}[{index}]")
    else:
        assert first == second, where


def final_checkpoint(run: Path, step: int) -> dict[str, Any]:
    payload: dict[str, Any] = torch.load(run / f"checkpoints/step_{step:08d}.pt", weights_only=True)
    del payload["state"]["wall_time_s"]
    return payload


def log_rows(run: Path) -> list[dict[str, Any]]:
    """The metrics log without clock values."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_sec"} for row in rows]


def assert_same_run(straight: Path, resumed: Path, step: int) -> None:
    equal(final_checkpoint(straight, step), final_checkpoint(resumed, step))
    assert log_rows(straight) == log_rows(resumed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_killed_and_resumed_equals_uninterrupted(cli: Cli, source: str, workers: int) -> None:
    write_sources(cli.folder)
    command = ["train", "base.yaml", *PLUGIN, *SOURCES[source], f"data.num_workers={workers}"]
    straight = cli(*command, "output_dir=straight")
    assert straight.exit_code == 0, straight.stderr
    killed = cli(*command, "output_dir=resumed", env={"KILL_AT": "on_step:17"})
    assert killed.exit_code == -9, killed.stderr
    resumed = cli(*command, "output_dir=resumed", "--resume", "auto")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_run(cli.folder / "straight", cli.folder / "resumed", 40)


def test_resume_from_every_checkpoint(cli: Cli) -> None:
    """Also across epochs, in the middle of a log window, and with an odd last batch of an epoch."""
    write_sources(cli.folder)
    command = ["train", "base.yaml", *SOURCES["jsonl prompt"], "training.log_interval=7", "training.max_steps=30"]
    command += ["checkpoint.keep_last=100", "checkpoint.interval_steps=1", "training.train_batch_size=3"]
    assert cli(*command, "output_dir=straight").exit_code == 0
    for step in (1, 8, 13, 29):
        checkpoint = cli.folder / f"straight/checkpoints/step_{step:08d}.pt"
        finished = cli(*command, f"output_dir=from{step}", "--resume", str(checkpoint))
        assert finished.exit_code == 0, finished.stderr
        equal(final_checkpoint(cli.folder / "straight", 30), final_checkpoint(cli.folder / f"from{step}", 30))


@pytest.mark.parametrize("when", ["on_step:7", "on_log:20", "on_eval:20", "on_checkpoint:20", "on_checkpoint:5"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_resumes_exactly(cli: Cli, when: str, name: str) -> None:
    write_sources(cli.folder)
    command = ["train", "base.yaml", *PLUGIN, *SOURCES["text"]]
    assert cli(*command, "output_dir=straight").exit_code == 0
    stopped = cli(*command, "output_dir=resumed", "--json", env={"KILL_AT": when, "KILL_SIGNAL": name})
    assert stopped.exit_code == 143, stopped.stderr
    step = int(when.split(":")[1])
    assert stopped.json["state"] == "preempted" and stopped.json["step"] in (step, step + 1)
    resumed = cli(*command, "output_dir=resumed", "--resume", "auto")
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_run(cli.folder / "straight", cli.folder / "resumed", 40)


@pytest.mark.parametrize("name", ["step_00000004.pt", "last.pt"])
def test_a_finished_run_goes_on_from_a_checkpoint_that_is_named(cli: Cli, name: str) -> None:
    """And ends as it did."""
    write_sources(cli.folder)
    settings = ("training.max_steps=6", "training.eval_interval=2", "checkpoint.interval_steps=2")
    command = ("train", "base.yaml", *SOURCES["text"], *settings)
    run, straight = cli.folder / "runs/t", cli.folder / "straight"
    assert cli(*command).exit_code == 0
    shutil.copytree(run, straight, symlinks=True)
    again = cli(*command, "--resume", str(run / "checkpoints" / name))
    assert again.exit_code == 0 and "already complete" not in again.stderr, again.stderr
    assert_same_run(straight, run, 6)


def test_a_run_that_is_resumed_at_its_end_is_that_of_its_checkpoint(cli: Cli) -> None:
    """Whose last step is the one it goes back to, and whose checkpoint is of another directory."""
    write_sources(cli.folder)
    command = ("train", "base.yaml", *SOURCES["text"], "training.eval_interval=2", "checkpoint.interval_steps=2")
    run, other = cli.folder / "runs/t", cli.folder / "other"
    assert cli(*command, "training.max_steps=4").exit_code == 0
    shutil.copytree(run, cli.folder / "long", symlinks=True)
    for folder, source, step in ((run, run, 2), (other, cli.folder / "long", 4)):
        checkpoint = source / f"checkpoints/step_{step:08d}.pt"
        at_end = (f"training.max_steps={step}", f"output_dir={folder}", "--resume", str(checkpoint))
        finished = cli(*command, *at_end)
        assert finished.exit_code == 0, finished.stderr
        assert f"- Step: {step} " in (folder / "model/README.md").read_text()
        assert sorted(path.stem for path in (folder / "checkpoints").glob("*.pt"))[-1] == f"step_{step:08d}"
        assert read_status(folder)["best_step"] == step


def test_a_stop_ends_the_loader_processes(cli: Cli) -> None:
    """Those of the validation loader live on between evaluations. A process of `multiprocessing`, as this one is, waits
    for its children before it ends, and they ignore the SIGTERM that it sends them."""
    write_sources(cli.folder)
    command = ["train", "base.yaml", *PLUGIN, *SOURCES["jsonl"], "data.num_workers=1", "training.eval_interval=3"]
    stopped = cli.start(*command, env={"KILL_AT": "on_step:5", "KILL_SIGNAL": "SIGTERM"}).wait()
    assert stopped.exit_code == 143, stopped.stderr


def test_stop_inside_the_evaluation_that_ends_the_run_early(cli: Cli) -> None:
    """The resumed run does that evaluation, stops early, and logs a last row that was not due: the same row."""
    write_sources(cli.folder)
    command = ["train", "base.yaml", *PLUGIN, *SOURCES["text"], "training.log_interval=7", "training.eval_interval=10"]
    command += ["training.early_stopping_patience=1", "training.learning_rate=1e-30"]
    assert cli(*command, "output_dir=straight").exit_code == 0
    last = log_rows(cli.folder / "straight")[-1]
    assert last["step"] == 20 and last["grad_norm"] > 0, "stopped early, between two log lines"
    stopped = cli(*command, "output_dir=resumed", env={"KILL_AT": "on_step:20", "KILL_SIGNAL": "SIGTERM"})
    assert stopped.exit_code == 143, stopped.stderr
    assert cli(*command, "output_dir=resumed", "--resume", "auto").exit_code == 0
    assert_same_run(cli.folder / "straight", cli.folder / "resumed", 20)


def test_killed_between_checkpoint_and_export_still_exports(cli: Cli) -> None:
    write_sources(cli.folder)
    command = ["train", "base.yaml", *PLUGIN, *SOURCES["text"]]
    assert cli(*command, env={"KILL_AT": "on_checkpoint:40"}).exit_code == -9
    assert not (cli.folder / "runs/t/model/model.safetensors").exists()
    assert cli(*command, "--resume", "auto").exit_code == 0
    assert (cli.folder / "runs/t/model/model.safetensors").exists()


def test_base_shape_has_dropout() -> None:
    """The equality above means little without randomness in the model."""
    from transformers import GPT2Config

    assert BASE["model"]["config"]["model_type"] == "gpt2" and GPT2Config().resid_pdrop > 0
