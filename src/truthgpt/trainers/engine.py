"""The tensors of a run: one optimizer step, forward to update. The trainer owns time, the engine owns tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from truthgpt.data.base import Batch, GlobalBatch, LossAndLogits
from truthgpt.data.cut import cut_micro_batch
from truthgpt.errors import CheckpointError, NonFiniteError, OutOfMemoryError
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.causal_lm import enable_gradient_checkpointing
from truthgpt.models.trained_weights import check_adapters_are_reached, load_trained_state, trained_state
from truthgpt.runtime.precision import Precision
from truthgpt.runtime.seeds import seed_micro_batch
from truthgpt.trainers.ema import WeightAverage
from truthgpt.trainers.guards import NonFiniteGuard
from truthgpt.trainers.micro_step import EagerMicroStep, GraphedMicroStep, MicroStep

Objective = Callable[[Any, Batch], LossAndLogits]
"""`(model, batch) -> (loss sum, what computes the logits)`."""

LearningRateFactor = Callable[[int], float]
"""Step (from 0) -> what the peak learning rate is multiplied by."""


@dataclass(frozen=True)
class EngineSettings:
    """The numbers of a step."""

    seed: int
    max_grad_norm: float | None
    detect_anomaly: bool = False
    cuda_graph: bool = False
    """Record forward and backward once and replay them; for micro-batches of one shape on a GPU."""


@dataclass(frozen=True)
class StepScalars:
    """What a step leaves on the device (0-d each), to be read when a log line is due."""

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor


class TrainEngine:
    """Model, optimizer and what surrounds them; `train_step` takes one global batch."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: LearningRateFactor,
        precision: Precision,
        ema: WeightAverage,
        guard: NonFiniteGuard,
        settings: EngineSettings,
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.ema = ema
        self.guard = guard
        self._settings = settings
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._peak_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._micro_step = self._build_micro_step()
        self._took_a_step = False
        self._rows: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._parameters[0].device

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group at the last step taken."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(self, batch: GlobalBatch, step: int) -> StepScalars:
        """Take optimizer step `step` (from 0) on one global batch.

        The loss is the sum over all its supervised tokens divided by their count, so that cutting the batch into other
        micro-batches changes nothing. A step whose loss or gradient is not finite leaves weights and state untouched.

        Raises:
            NonFiniteError: with `detect_anomaly`, naming the operation that made the first NaN.
            ConfigError: in the first step, naming adapters that have no gradient.
            torch.OutOfMemoryError: forward or backward is out of memory; the step can be taken again.
            OutOfMemoryError: the update is, and it cannot: some weights may have changed.
        """
        self.model.train()
        self.set_learning_rate(step)
        loss_sum = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(self._cut(batch.micro_batches)):
            seed_micro_batch(self._settings.seed, step, index, rank=0)
            loss_sum += self._micro_step(micro_batch, batch.tokens, first=index == 0)
        if not self._took_a_step:
            check_adapters_are_reached(self.model)
            self._took_a_step = True
        with _only_once(step):
            self.precision.unscale(self.optimizer)
            grad_norm = self._gradient_norm()
            self.precision.step(self.optimizer, self.guard.judge(loss_sum, grad_norm), self._clip(grad_norm))
            self._micro_step.clear()
            self.ema.update(step + 1)
        return StepScalars(loss_sum, grad_norm)

    def change_plan(self, plan: MemoryPlan) -> None:
        """Go on with smaller micro-batches, whatever the loader hands over, or more layers computed again.

        Called where a step ran out of memory; what it had of gradients is dropped, so that it can be taken again.
        """
        self._rows = plan.micro_batch_size
        if plan.checkpointed_layers:
            enable_gradient_checkpointing(self.model, plan.checkpointed_layers)
        self._micro_step.clear()
        self._micro_step = self._build_micro_step()  # a recorded graph is of the old shapes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cut(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        if self._rows is None:
            return micro_batches
        return [piece for batch in micro_batches for piece in cut_micro_batch(batch, self._rows)]

    def _build_micro_step(self) -> MicroStep:
        eager = EagerMicroStep(self._backward, self._parameters, self.device)
        if not self._settings.cuda_graph:
            return eager
        return GraphedMicroStep(eager, self._backward, self._parameters, self.device)

    def _backward(self, batch: Batch, tokens: int | torch.Tensor) -> torch.Tensor:
        with self._anomaly_detection():
            with self.precision.autocast():
                loss, _ = self.objective(self.model, batch)
            try:
                self.precision.scale(loss / tokens).backward()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if self._settings.detect_anomaly and "returned nan values" in str(error):
                    raise NonFiniteError(f"training.detect_anomaly: {error}") from error
                raise
        return loss.detach().float()

    def _anomaly_detection(self) -> AbstractContextManager[None]:
        if self._settings.detect_anomaly:
            return torch.autograd.set_detect_anomaly(True)
        return nullcontext()

    @torch.no_grad()
    def _gradient_norm(self) -> torch.Tensor:
        """Global norm of the gradients (0-d, float32): torch's own sums up half-precision norms in half precision."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype)))
        return norm

    def _clip(self, grad_norm: torch.Tensor) -> torch.Tensor | None:
        """What the gradients are to be divided by, so that their norm is at most `max_grad_norm` (0-d)."""
        limit = self._settings.max_grad_norm
        return None if limit is None else ((grad_norm + 1e-6) / limit).clamp_min(1.0)

    def set_learning_rate(self, step: int) -> None:
        """Give every parameter group the rate of optimizer step `step` (from 0)."""
        factor = self.schedule(step)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint parts the engine owns: model, ema, optimizer, scheduler, scaler, rng."""
        return {
            "model": trained_state(self.model),
            "ema": self.ema.state_dict(),
            "optimizer": {**self.optimizer.state_dict(), "kind": type(self.optimizer).__name__},
            "scheduler": {"peak_learning_rates": self._peak_rates},
            "scaler": self.precision.state_dict(),
            # Dropout, data order and samples are derived from (seed, position): there is no other random state.
            "rng": {"seed": self._settings.seed},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s parts in place. Hyperparameters stay as configured now.

        Raises:
            CheckpointError: the parts are of another model, seed or optimizer, with the first difference.
        """
        seed = state["rng"]["seed"]
        if seed != self._settings.seed:
            raise CheckpointError(
                f"the checkpoint is of a run with seed {seed}, this one has {self._settings.seed}: the order of the "
                f"data and dropout would be neither's. Set seed: {seed}, or start a new run without a checkpoint"
            )
        _refuse_other_model(trained_state(self.model), state["model"])
        load_trained_state(self.model, state["model"])
        self._load_optimizer(state["optimizer"])
        try:
            self.ema.load_state_dict(state["ema"] or self._raw_weights())
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint's averaged weights do not fit this model: {error}") from error
        self.precision.load_state_dict(state["scaler"])

    def _raw_weights(self) -> dict[str, torch.Tensor]:
        """What a newly enabled average starts from when the checkpoint has none."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        own = type(self.optimizer).__name__
        saved = state.get("kind", own)
        if saved != own:  # the same `optimizer.type` where something else stood in for it
            raise CheckpointError(f"the checkpoint's optimizer state is of {saved}, this run's optimizer is {own}")
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(dict(state))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's optimizer state does not fit this optimizer: {error}") from error
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)


@contextmanager
def _only_once(step: int) -> Iterator[None]:
    """The update of step `step` (from 0), which must not be taken again when it is out of memory half way."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of memory in the update of step {step + 1}: {str(error).splitlines()[0]} Smaller micro-batches do "
            "not help: the optimizer and the average of the weights take it. Set ema.on_cpu=true, another "
            "optimizer.type, model.lora.enabled=true, or choose a smaller model. The last checkpoint is untouched"
        ) from error


def _refuse_other_model(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    differences: Sequence[str] = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not part of this model" for name in found if name not in expected),
        *(
            f"{name} is {tuple(found[name].shape)}, this model's is {tuple(expected[name].shape)}"
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        ),
    ]
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise CheckpointError(f"the checkpoint is of another model: {differences[0]}{more}")
