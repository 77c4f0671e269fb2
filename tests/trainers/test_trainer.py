"""The loop: in which order things happen, what the callbacks hear, and what an error or a stop leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_build import build_small_trainer, registered
from torch import nn

from truthgpt.data.base import Batch, LossAndLogits
from truthgpt.errors import NonFiniteError, OutOfMemoryError, Preempted
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.metrics import METRICS
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.trainers.trainer import GenericTrainer


class Recorder:
    """Hears everything, and can act at a hook."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, dict[str, Any]]] = []
        self.acts: dict[tuple[str, int], Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def hook(state: Any, info: Mapping[str, Any]) -> None:
            self.heard.append((name, state.step, dict(info)))
            if (name, state.step) in self.acts:
                self.acts[name, state.step]()

        return hook

    def names(self, *wanted: str) -> list[tuple[str, int]]:
        return [(name, step) for name, step, _ in self.heard if not wanted or name in wanted]


@pytest.fixture
def recorder() -> Any:
    recorder = Recorder()
    with registered(CALLBACKS, "recorder", lambda: recorder):
        yield recorder


SMALL = ("training.callbacks=[recorder]", "training.max_steps=6", "training.log_interval=2", "training.eval_interval=3")
SHAPE = (*SMALL, "checkpoint.interval_steps=4")


def trainer_for(folder: Path, *overrides: str) -> GenericTrainer:
    return build_small_trainer(folder, *SHAPE, *overrides)


def test_order_of_events(tmp_path: Path, recorder: Recorder) -> None:
    state = trainer_for(tmp_path).train()
    assert state.step == 6
    assert recorder.names() == [
        ("on_start", 0),
        *[("on_step", 1), ("on_log", 1)],
        *[("on_step", 2), ("on_log", 2)],
        *[("on_step", 3), ("on_eval", 3), ("on_checkpoint", 3)],
        *[("on_step", 4), ("on_log", 4), ("on_checkpoint", 4)],
        ("on_step", 5),
        *[("on_step", 6), ("on_log", 6), ("on_eval", 6), ("on_checkpoint", 6)],
        ("on_end", 6),
    ]


def test_what_the_hooks_are_told(tmp_path: Path, recorder: Recorder) -> None:
    trainer_for(tmp_path, "generate.prompts=[the]", "generate.max_new_tokens=2").train()
    told = {name: info for name, _, info in recorder.heard}
    start = told["on_start"]
    assert {"run_name", "project", "log_dir", "run_directory", "max_steps", "device", "precision", "parameters"} < set(
        start
    )
    assert (start["resumed_step"], start["tokens_per_step"], start["max_steps"]) == (0, 4 * 2 * 32, 6)
    assert start["config"]["seed"] == 7 and start["parameters"] == start["trainable_parameters"] > 1000
    assert told["on_step"] == {}
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_sec", "epoch", "tokens", "skipped_steps"} <= set(
        told["on_log"]
    )
    assert told["on_eval"]["is_best"] is True and told["on_eval"]["val_loss"] > 0
    assert [sample["prompt"] for sample in told["on_eval"]["samples"]] == ["the"]
    assert Path(told["on_checkpoint"]["path"]).is_file() and told["on_checkpoint"]["best"] is True
    end = told["on_end"]
    assert (end["status"], end["step"], end["best_step"], end["skipped_steps"]) == ("complete", 6, 6, 0)
    assert end["tokens"] == 6 * 256 and end["wall_time_s"] > 0


def test_epochs_are_announced_when_they_begin(tmp_path: Path, recorder: Recorder) -> None:
    overrides = ("data.source=jsonl", "training.train_batch_size=30", "training.max_steps=null", "training.epochs=3")
    trainer_for(tmp_path, *overrides).train()
    epochs = [(step, info["epoch"]) for name, step, info in recorder.heard if name == "on_epoch"]
    assert epochs == [(3, 1), (5, 2)], "two steps an epoch; 0 is where a run begins"


def test_callbacks_that_fail_end_no_run(tmp_path: Path, recorder: Recorder) -> None:
    def fail() -> None:
        raise ValueError("tracker is down")

    recorder.acts["on_step", 2] = fail
    assert trainer_for(tmp_path).train().step == 6
    assert recorder.names()[-1] == ("on_step", 2), "a failing callback is left out from then on"


def test_state_is_read_only(tmp_path: Path) -> None:
    trainer = build_small_trainer(tmp_path, "training.max_steps=1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        trainer.state.step = 5  # type: ignore[misc]


def test_error_reaches_caller_callbacks_and_status(tmp_path: Path, recorder: Recorder) -> None:
    trainer = trainer_for(tmp_path)

    def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
        if trainer.state.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.\nlong story")
        return causal_lm_loss(model, batch)

    trainer.parts.engine.objective = objective
    with pytest.raises(OutOfMemoryError, match="step 5 with micro-batches of 4 x 32 labels") as caught:
        trainer.train()
    assert "long story" not in str(caught.value)
    assert recorder.names()[-2:] == [("on_exception", 4), ("on_end", 4)]
    status = json.loads((tmp_path / "runs/t/status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 7, 4)
    assert (tmp_path / "runs/t/checkpoints/step_00000004.pt").is_file()


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_log", "on_checkpoint"])
def test_stop_saves_once_and_says_by_what(tmp_path: Path, recorder: Recorder, hook: str) -> None:
    trainer = trainer_for(tmp_path)

    def stop() -> None:
        trainer.parts.stop.requested, trainer.parts.stop.name = True, "SIGTERM"

    at = 0 if hook == "on_start" else 4
    recorder.acts[hook, at] = stop
    with pytest.raises(Preempted, match="SIGTERM"):
        trainer.train()
    saves = recorder.names("on_checkpoint")
    assert saves[-1][1] >= at and len(saves) == len(set(saves)), "no step is saved twice"
    assert recorder.heard[-1][2]["status"] == "preempted"


def stopped_in_its_evaluation(folder: Path, step: int, *overrides: str) -> None:
    """A run that is stopped while it evaluates behind `step`."""
    trainer = build_small_trainer(folder, "training.callbacks=[]", "training.log_interval=1", *overrides)
    evaluate = trainer.parts.evaluator.run

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if trainer.state.step == step:
            trainer.parts.stop.requested, trainer.parts.stop.name = True, "SIGTERM"
        return evaluate(*arguments, **keywords)

    trainer.parts.evaluator.run = stop  # type: ignore[method-assign, union-attr]
    with pytest.raises(Preempted, match=f"after step {step}, and saved; the same command with --resume auto"):
        trainer.train()


def rows_of(folder: Path) -> list[tuple[int, bool]]:
    """Step of every row of the metrics log, and whether it is of an evaluation."""
    lines = (folder / "runs/t/metrics.jsonl").read_text().splitlines()
    return [(row["step"], "val_loss" in row) for row in map(json.loads, lines)]


def test_an_evaluation_is_made_up_for_though_it_is_no_longer_due(tmp_path: Path) -> None:
    """It was due because the run ended there; a longer run logs its steps all the same."""
    interval = ("training.eval_interval=100", "checkpoint.interval_steps=100")
    stopped_in_its_evaluation(tmp_path, 3, "training.max_steps=3", *interval)
    more = ("training.callbacks=[]", "training.log_interval=1", "training.max_steps=5", "resume.enabled=true")
    assert not build_small_trainer(tmp_path, *more, *interval).train().pending_evaluation
    steps = [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (5, True)]
    assert rows_of(tmp_path) == steps


def test_an_evaluation_that_was_made_up_for_is_not_made_again(tmp_path: Path) -> None:
    """Nothing improved, and no checkpoint was due: the kill that follows comes back to before it."""
    usual = ("training.max_steps=6", "training.eval_interval=2", "checkpoint.interval_steps=100")
    usual = (*usual, "training.learning_rate=1e-30", "training.callbacks=[]", "training.log_interval=1")
    stopped_in_its_evaluation(tmp_path, 4, *usual)
    killed = build_small_trainer(tmp_path, *usual, "resume.enabled=true")
    killed.parts.engine.objective = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        killed.train()
    build_small_trainer(tmp_path, *usual, "resume.enabled=true").train()
    assert [step for step, evaluated in rows_of(tmp_path) if evaluated] == [2, 4, 6]


def test_batch_without_labels_passes_by_uncounted(tmp_path: Path, recorder: Recorder) -> None:
    """It is a step of the data, and no update, no guard event, no loss."""
    trainer = trainer_for(tmp_path, "training.log_interval=1")
    batches = trainer.parts.loader.batches

    def emptied(start: int = 0) -> Any:
        for step, batch in enumerate(batches(start), start):
            if step == 2:
                for micro_batch in batch.micro_batches:
                    micro_batch["labels"].fill_(-100)
                batch = dataclasses.replace(batch, tokens=0)
            yield batch

    trainer.parts.loader.batches = emptied  # type: ignore[method-assign]
    weights = []
    recorder.acts = {("on_step", n): lambda: weights.append(first_weight(trainer)) for n in (2, 3, 4)}
    state = trainer.train()
    assert (state.step, state.empty_batches, state.skipped_steps, state.tokens) == (6, 1, 0, 5 * 256)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    losses = {step: info["loss"] for name, step, info in recorder.heard if name == "on_log"}
    assert math.isnan(losses[3]) and all(math.isfinite(losses[step]) for step in (1, 2, 4, 5, 6))


def first_weight(trainer: GenericTrainer) -> torch.Tensor:
    return next(trainer.parts.engine.model.parameters()).detach().clone()


def scripted_metric(values: list[float], direction: str) -> Any:
    """A metric whose values are given in advance."""

    class Scripted:
        name = "scripted"

        def __init__(self) -> None:
            self.direction = direction
            self._values = iter(values)

        def reset(self) -> None: ...

        def update(self, batch: Any) -> None: ...

        def compute(self) -> float:
            return next(self._values)

    return Scripted


@pytest.mark.parametrize(
    ("direction", "values", "best_step", "last_step"),
    [
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0], 2, 4),  # a tie is no improvement
        ("max", [3.0, 2.0, 4.0, 1.0, 1.0], 3, 5),
        ("min", [math.nan, 5.0, math.inf, 4.0, 3.0], 5, 5),  # non-finite is never best
        ("min", [math.nan, math.nan, 1.0, 1.0, 1.0], None, 2),
        ("max", [1.0, 2.0, 3.0, 4.0, 5.0], 5, 5),
    ],
)
def test_best_and_patience(
    tmp_path: Path, direction: str, values: list[float], best_step: int | None, last_step: int
) -> None:
    overrides = (
        *("eval.metrics=[scripted]", "eval.select_best_by=scripted", "training.early_stopping_patience=2"),
        *("training.max_steps=5", "training.eval_interval=1", "training.log_interval=100"),
    )
    with registered(METRICS, "scripted", scripted_metric(values, direction)):
        state = build_small_trainer(tmp_path, *overrides).train()
    assert (state.best_step, state.step) == (best_step, last_step)
    assert state.best_metric == (None if best_step is None else values[best_step - 1])
    checkpoints = tmp_path / "runs/t/checkpoints"
    assert (checkpoints / "best.pt").exists() == (best_step is not None)
    if best_step is not None:
        assert json.loads((checkpoints / "best.json").read_text())["step"] == best_step
    if last_step < 5:
        assert state.stop_reason is not None and "patience" in state.stop_reason


def test_another_metric_to_select_by_finds_its_own_best(tmp_path: Path) -> None:
    """A perplexity that no accuracy exceeds would end the resumed run by its patience."""
    usual = ("training.eval_interval=1", "training.early_stopping_patience=2", "training.callbacks=[]")
    metrics = (*usual, "eval.metrics=[ppl, scripted]")
    with registered(METRICS, "scripted", scripted_metric([0.1, 0.2], "max")):
        build_small_trainer(tmp_path, "training.max_steps=2", *metrics).train()
    more = ("training.max_steps=4", "eval.select_best_by=scripted", "resume.enabled=true")
    with registered(METRICS, "scripted", scripted_metric([0.3, 0.4], "max")):
        state = build_small_trainer(tmp_path, *more, *metrics).train()
    assert (state.best_metric, state.best_step, state.stop_reason) == (0.4, 4, None)


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    """Dropout, order and weights are the same whether a run is evaluated, sampled, logged and saved or not."""
    ends = []
    for name, overrides in {
        "bare": ("training.eval_interval=100", "training.log_interval=100", "checkpoint.interval_steps=100"),
        "busy": (
            "training.eval_interval=1",
            "training.log_interval=1",
            "checkpoint.interval_steps=1",
            "generate.prompts=[a]",
        ),
    }.items():
        build_small_trainer(tmp_path, f"output_dir={tmp_path / name}", "training.max_steps=5", *overrides).train()
        payload = torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True)
        ends.append({**payload["model"], **{f"ema.{key}": value for key, value in payload["ema"].items()}})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_guard_ends_the_run(tmp_path: Path, recorder: Recorder) -> None:
    trainer = trainer_for(tmp_path, "guards.max_consecutive_skips=1")

    def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
        loss, logits = causal_lm_loss(model, batch)
        return loss * (math.nan if trainer.state.step >= 2 else 1.0), logits

    trainer.parts.engine.objective = objective
    with pytest.raises(NonFiniteError, match="more than 1 steps in a row"):
        trainer.train()
    assert trainer.state.step == 3, "the fourth step is the second bad one"


def test_constructor_does_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "training.callbacks=[]")
    GenericTrainer(trainer.parts, trainer.settings)
    assert not (tmp_path / "runs/t/metrics.jsonl").exists() and not (tmp_path / "runs/t/status.json").exists()
