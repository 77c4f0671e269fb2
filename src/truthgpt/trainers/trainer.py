"""The training loop. The trainer owns time: when to step, log, evaluate, save, stop. Others own tensors and files."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truthgpt.callbacks.base import CallbackList
from truthgpt.data.base import GlobalBatch, TrainLoader
from truthgpt.errors import CheckpointError, DataError, OutOfMemoryError, Preempted
from truthgpt.memory.base import EVERY_LAYER
from truthgpt.memory.step_down import PlanInUse
from truthgpt.runtime.metrics_log import MetricsLog
from truthgpt.runtime.stop_signal import StopSignal
from truthgpt.trainers.checkpoint import CheckpointStore
from truthgpt.trainers.engine import StepScalars, TrainEngine
from truthgpt.trainers.evaluate import Evaluation, Evaluator
from truthgpt.trainers.meter import StepMeter
from truthgpt.trainers.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerSettings:
    """When things happen; all counted in optimizer steps."""

    max_steps: int
    log_interval: int
    eval_interval: int
    checkpoint_interval: int
    early_stopping_patience: int | None = None
    max_tokens: int | None = None
    max_time_s: float | None = None


@dataclass(frozen=True)
class TrainerParts:
    """What the loop works with. `evaluator` is None without a validation split."""

    engine: TrainEngine
    loader: TrainLoader
    evaluator: Evaluator | None
    checkpoints: CheckpointStore
    callbacks: CallbackList
    metrics_log: MetricsLog
    meter: StepMeter
    stop: StopSignal
    sample: Callable[[], list[dict[str, str]]]
    """Writes samples with the model as it stands; empty when none are asked for."""
    export: Callable[[Path], None]
    """Writes the final model from a checkpoint."""
    facts: Mapping[str, Any]
    """What `on_start` tells the callbacks about the run."""
    plan: PlanInUse
    """How a step is cut up, kept with every checkpoint: a resumed run goes on with it."""
    validation: str | None
    """Fingerprint of what is evaluated on; None without a validation split."""


class GenericTrainer:
    """Trains any model whose objective, data and optimizer it is given: one loop for every task."""

    def __init__(self, parts: TrainerParts, settings: TrainerSettings) -> None:
        self.parts = parts
        self.settings = settings
        self.state = TrainState(max_steps=settings.max_steps)
        self._started_s = time.perf_counter()
        self._wall_time_before_s = 0.0
        self._saved_step: int | None = None
        # Of the best so far: kept by a resume without validation, or the next one would compare with another's.
        self._validation = parts.validation
        self._best_by = parts.evaluator.selected_by if parts.evaluator else None

    def train(self) -> TrainState:
        """Train until the last step, a limit or early stopping; returns the final state.

        Raises:
            Preempted: a stop signal arrived; everything up to the finished step is saved.
            NonFiniteError, DataError, OutOfMemoryError, RunDirectoryError: see their exit codes.
        """
        self._begin()
        try:
            if self.state.pending_evaluation:
                self._boundary()
            with closing(self.parts.loader.batches(self.state.step)) as batches:
                while not self._is_over():
                    self._leave_if_asked()
                    self._advance(next(batches))
                    self._boundary()
            if self._saved_step is None:  # resumed at its end: the folder may hold a branch that was left, or nothing
                self._save(best=self.state.best_step == self.state.step)
            self.parts.export(self.parts.checkpoints.best_or_last())
        except BaseException as error:
            self._call("on_exception", {"error": error})
            self._end("preempted" if isinstance(error, Preempted) else "failed")
            raise
        self._end("complete")
        return self.state

    def _begin(self) -> None:
        self._started_s = time.perf_counter()
        self._wall_time_before_s = self.state.wall_time_s
        self._call("on_start", {**self.parts.facts, "resumed_step": self.state.step})
        # What is built lives as long as the run: without it to look through, a collection takes no half second.
        gc.collect()
        gc.freeze()
        self.parts.meter.restart_clock()

    def _advance(self, batch: GlobalBatch) -> None:
        """One optimizer step; a batch without supervised tokens passes by, counted."""
        state, epoch_before = self.state, self.state.epoch
        if batch.tokens:
            scalars = self._take_step(batch)
            self.parts.meter.add(scalars, batch.tokens)
            if (
                self.parts.engine.device.type == "cpu"
            ):  # reading back is free there; elsewhere log lines and saves check
                self.parts.engine.guard.check()
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            epoch=batch.epoch,
            tokens=state.tokens + batch.tokens,
            samples=state.samples + batch.samples,
            empty_batches=state.empty_batches + (batch.tokens == 0),
            wall_time_s=self._wall_time_before_s + time.perf_counter() - self._started_s,
        )
        if batch.epoch != epoch_before:
            self._call("on_epoch", {"epoch": batch.epoch})
        self._call("on_step", {})

    def _take_step(self, batch: GlobalBatch) -> StepScalars:
        """The step, with the plan in use or, where that is out of memory, the next one below: weights and order are
        untouched then, and the result is the same to rounding."""
        while True:
            try:
                return self.parts.engine.train_step(batch, self.state.step)
            except torch.OutOfMemoryError as error:
                shape = " x ".join(map(str, batch.micro_batches[0]["labels"].shape))
                doing = f"step {self.state.step + 1} with micro-batches of {shape} labels"
                plan = self.parts.plan.step_down()
                if plan is None:
                    cure = "training.train_batch_size (raise grad_accum_steps to keep the result)"
                    raise _out_of_memory(doing, cure, error) from error
                reason = str(error).splitlines()[0]
            # Outside the except block, which holds on to the tensors of the step that failed.
            logger.warning(
                "out of memory in %s: %s Going on with micro-batches of %d samples%s; the step is taken again",
                *(doing, reason, plan.micro_batch_size),
                ", every layer computed again" if plan.checkpointed_layers == EVERY_LAYER else "",
            )
            self.parts.engine.change_plan(plan)

    def _boundary(self) -> None:
        """Between two steps: log, evaluate, save what is due. The end of a run is a boundary like any other."""
        self._note_limits()
        log_due, pending = self._due(self.settings.log_interval, first=True), self.state.pending_evaluation
        if log_due and not pending:  # a resumed evaluation's step was logged before the stop
            self._log()
        # A pending one is done though it may no longer be due: the run was made longer, or the interval another.
        improved = self._evaluate() if pending or self._due(self.settings.eval_interval) else False
        if self._is_over() and not log_due:  # early stopping: the last step is always logged
            self._log()
        asked_to_stop = self.parts.stop.requested
        # Without the save behind a pending evaluation the next resume would do it, and log it, once more.
        if improved or pending or asked_to_stop or self._due(self.settings.checkpoint_interval):
            self._save(best=improved)
        if asked_to_stop and (self.state.pending_evaluation or not self._is_over()):
            raise Preempted(self._stopped("after"))

    def _leave_if_asked(self) -> None:
        """A stop that arrived before the first step, or after a save, still leaves a checkpoint, and one only."""
        if self.parts.stop.requested:
            if self._saved_step != self.state.step:
                self._save(best=False)
            raise Preempted(self._stopped("at"))

    def _stopped(self, where: str) -> str:
        said = f"stopped by {self.parts.stop.name} {where} step {self.state.step}, and saved"
        return f"{said}; the same command with --resume auto goes on from there"

    def _is_over(self) -> bool:
        return self.state.step >= self.settings.max_steps or self.state.stop_reason is not None

    def _due(self, interval: int, first: bool = False) -> bool:
        step = self.state.step
        return step % interval == 0 or (first and step == 1) or self._is_over()

    def _note_limits(self) -> None:
        """Set the reason to stop early, if there is one under the settings of now."""
        state, settings = self.state, self.settings
        without_improvement = state.evaluations_without_improvement
        limits = {
            "training.max_tokens": (state.tokens, settings.max_tokens),
            "training.max_time_s": (state.wall_time_s, settings.max_time_s),
            "training.early_stopping_patience": (without_improvement, settings.early_stopping_patience),
        }
        reached = [f"{key} {limit} reached" for key, (value, limit) in limits.items() if limit and value >= limit]
        self.state = dataclasses.replace(state, stop_reason=", ".join(reached) or None)

    def _log(self) -> None:
        engine = self.parts.engine
        per_epoch = self.parts.loader.steps_per_epoch
        epoch = round(self.state.step / per_epoch, 4) if per_epoch else self.state.epoch
        row = {"step": self.state.step, "epoch": epoch}
        row |= self.parts.meter.read()
        row |= {"lr": engine.learning_rate, "tokens": self.state.tokens, "skipped_steps": engine.guard.skipped()}
        if engine.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(engine.device)
        self.state = dataclasses.replace(self.state, skipped_steps=int(row["skipped_steps"]))
        self.parts.metrics_log.append(row)
        self._call("on_log", row)
        engine.guard.check()

    def _evaluate(self) -> bool:
        """Evaluate the averaged weights; whether they are the best so far."""
        evaluator, engine = self.parts.evaluator, self.parts.engine
        if evaluator is None:
            self.state = dataclasses.replace(self.state, pending_evaluation=False)
            return False
        with self.parts.meter.paused(), engine.ema.applied():
            try:
                evaluation = evaluator.run(engine.model, stop=lambda: self.parts.stop.requested)
            except torch.OutOfMemoryError as error:
                doing = f"the evaluation after step {self.state.step}"
                raise _out_of_memory(doing, "training.eval_batch_size", error) from error
            samples = self.parts.sample() if evaluation is not None else []
        self.state = dataclasses.replace(self.state, pending_evaluation=evaluation is None)
        return evaluation is not None and self._judge(evaluator, evaluation, samples)

    def _judge(self, evaluator: Evaluator, evaluation: Evaluation, samples: list[dict[str, str]]) -> bool:
        score = evaluator.score(evaluation)
        improved = evaluator.is_better(score, self.state.best_metric)
        without = 0 if improved else self.state.evaluations_without_improvement + 1
        self.state = dataclasses.replace(self.state, evaluations_without_improvement=without)
        if improved:
            self.state = dataclasses.replace(self.state, best_metric=score, best_step=self.state.step)
        values = {("val_loss" if name == "loss" else name): value for name, value in evaluation.values.items()}
        row = {"step": self.state.step, **values, "best_metric": self.state.best_metric}
        self.parts.metrics_log.append(row)
        self._call("on_eval", {**row, "is_best": improved, "samples": samples})
        self._note_limits()
        return improved

    def _save(self, best: bool) -> None:
        self.parts.engine.guard.check()
        with self.parts.meter.paused():
            path = self.parts.checkpoints.save(self.state.step, self._payload(), best=best)
        self._saved_step = self.state.step
        self._call("on_checkpoint", {"path": str(path), "best": best})

    def _payload(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "state": {
                **self.state.to_dict(),
                "validation": self._validation,
                "best_by": self._best_by,
                "meter": parts.meter.state_dict(),
                "guard": parts.engine.guard.state_dict(),
                "plan": dataclasses.asdict(parts.plan.plan),
            },
            **parts.engine.state_dict(),
            "data": parts.loader.state_dict(self.state.step),
            "callbacks": parts.callbacks.state_dict(),
        }

    def restore(self, path: Path) -> None:
        """Go on from the checkpoint at `path`, exactly where it was saved.

        Raises:
            CheckpointError: damaged, or of another model.
            DataError: the data is not what the run was trained on.
        """
        payload = self.parts.checkpoints.load(path)
        self.parts.loader.load_state_dict(payload["data"])
        self._check_validation(payload["state"].get("validation"))
        self.parts.engine.load_state_dict(payload)
        try:
            saved = TrainState.from_dict(payload["state"])
            self.parts.meter.load_state_dict(payload["state"]["meter"])
            self.parts.engine.guard.load_state_dict(payload["state"]["guard"])
        except KeyError as error:
            raise CheckpointError(f"{path}: the loop state has no {error}") from error
        self.parts.callbacks.load_state_dict(payload["callbacks"])
        self.state = dataclasses.replace(saved, max_steps=self.settings.max_steps)
        self._forget_best_of(payload["state"].get("best_by"))
        self.parts.engine.set_learning_rate(max(self.state.step - 1, 0))  # what a log line due now would show
        self._note_limits()  # a limit that was raised since no longer ends the run
        self.parts.metrics_log.cut_after(self.state.step)

    def _check_validation(self, then: str | None) -> None:
        """Values on other data are no better or worse than those before; of a run without any there is none."""
        now = self.parts.validation
        self._validation = now or then
        if then is not None and now is not None and then != now:
            raise DataError(
                f"the validation data is not what this run was evaluated on: fingerprint {then[:12]} then, {now[:12]} "
                "now. Restore its files, data.validation_path or data.validation_split, or start a new run in another "
                "output_dir"
            )

    def _forget_best_of(self, metric: str | None) -> None:
        """Values of the restored run's `metric` (None: not known) are not compared with those of another one."""
        if self._best_by is None:
            self._best_by = metric
        if metric in (None, self._best_by):
            return
        logger.warning("eval.select_best_by is %s now and was %s: the best so far is forgotten", self._best_by, metric)
        self.state = dataclasses.replace(
            self.state, best_metric=None, best_step=None, evaluations_without_improvement=0
        )

    def start_over(self) -> None:
        """Say that there is nothing to resume, and begin at step 0."""
        logger.info("no checkpoint to resume from: starting fresh")
        self.parts.metrics_log.cut_after(0)

    def _end(self, status: str) -> None:
        gc.unfreeze()
        keys = ("step", "best_metric", "best_step", "wall_time_s", "tokens", "skipped_steps", "stop_reason")
        self._call("on_end", {"status": status, **{key: getattr(self.state, key) for key in keys}})

    def _call(self, hook: str, info: Mapping[str, Any]) -> None:
        self.parts.callbacks.call(hook, self.state, info)


def _out_of_memory(doing: str, cure: str, error: torch.OutOfMemoryError) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"out of memory in {doing}: {str(error).splitlines()[0]} Lower {cure}, lower data.max_seq_len, or set "
        f"model.gradient_checkpointing=true. The last checkpoint is untouched"
    )
