"""What a configuration will take before it is trained: memory by part, time, and the plan. Layer 4."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from truthgpt.build_memory import Machine, StepCost, choose_plan, machine_of, step_cost, usable_bytes
from truthgpt.config.schema import Config
from truthgpt.errors import ConfigError, OutOfMemoryError, Problem
from truthgpt.memory.base import EVERY_LAYER, MemoryEstimate, MemoryPlan
from truthgpt.runtime.device import choose_device
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.flops import peak_flops_by_name
from truthgpt.runtime.precision import choose_precision

CONTEXT_BYTES = 10**9
"""What a CUDA context takes of a GPU before the first tensor; on the machine itself it is measured."""


@dataclass(frozen=True)
class Alternative:
    """The same micro-batch with other layers computed again."""

    checkpointed_layers: int
    activation_bytes: int
    peak_bytes: int
    fits: bool
    step_time_s: float | None


@dataclass(frozen=True)
class RunPlan:
    """What a run takes.

    Attributes:
        device: what it is planned for, in words.
        micro_batch_size, grad_accum_steps: samples a micro-batch, and micro-batches a step.
        checkpointed_layers: of `layers`, computed again in the backward pass.
        memory_bytes: by part, at the moment of the peak.
        limit_bytes: memory that a run may take; None: not known.
        step_time_s, run_time_s: None where the device's speed, or the number of steps, is not known.
        problem: why nothing fits; None: it fits.
    """

    device: str
    precision: str
    compiled: bool
    parameters: int
    trainable_parameters: int
    samples_per_step: int
    tokens_per_step: int
    micro_batch_size: int
    grad_accum_steps: int
    checkpointed_layers: int
    layers: int
    memory_bytes: dict[str, int]
    peak_bytes: int
    peak_moment: str
    limit_bytes: int | None
    fits: bool
    step_time_s: float | None
    run_time_s: float | None
    checkpointing: list[Alternative]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan_run(config: Config, gpu_memory_bytes: int | None, gpu: str) -> RunPlan:
    """Plan `config` for the device of this machine, or for a GPU that need not be there.

    Args:
        gpu_memory_bytes: memory of the GPU to plan for; None: the device that the run would take here.
        gpu: its name, for its speed.

    Raises:
        ConfigError: the configuration is of no text model, or its model cannot be counted.
    """
    if config.model.task != "causal_lm":
        message = f"{config.model.task}: plans are made for causal_lm"
        raise ConfigError([Problem("model.task", message, suggestion="train the first steps with `benchmark train`")])
    machine, device = _machine(config, gpu_memory_bytes, gpu)
    try:
        cost = step_cost(config, machine)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"a step of this model cannot be counted without running it: {reason}") from error
    problem = None
    try:
        plan = choose_plan(config, machine, cost, previous=None)
    except OutOfMemoryError as error:
        problem = str(error)
        plan = MemoryPlan(1, cost.samples, 0 if config.model.gradient_checkpointing is False else EVERY_LAYER)
    return _described(config, machine, device, cost, plan, problem)


def _machine(config: Config, gpu_memory_bytes: int | None, gpu: str) -> tuple[Machine, str]:
    wanted = config.training.mixed_precision
    if gpu_memory_bytes is None:
        device = choose_device(config.hardware.device)
        return machine_of(device, choose_precision(wanted, device, Fallbacks()).name), str(device)
    limit = usable_bytes(gpu_memory_bytes - CONTEXT_BYTES)
    peak = peak_flops_by_name(gpu, wanted)
    return Machine("cuda", wanted, peak, limit), f"{gpu} with {gpu_memory_bytes / 2**30:.0f} GiB"


def _described(
    config: Config, machine: Machine, device: str, cost: StepCost, plan: MemoryPlan, problem: str | None
) -> RunPlan:
    estimate, steps = cost.memory(plan), config.training.max_steps
    step_time_s = cost.seconds(plan) if machine.peak_flops is not None else None
    layers = cost.layers
    choices = [MemoryPlan(plan.micro_batch_size, plan.grad_accum_steps, k) for k in (0, layers // 2, layers)]
    return RunPlan(
        device=device,
        precision=machine.precision,
        compiled=cost.compiled,
        parameters=cost.parameters,
        trainable_parameters=cost.trainable_parameters,
        samples_per_step=cost.samples,
        tokens_per_step=cost.tokens_per_step,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        checkpointed_layers=min(plan.checkpointed_layers, layers),
        layers=layers,
        memory_bytes=estimate.parts(),
        peak_bytes=estimate.peak_bytes,
        peak_moment=estimate.moment,
        limit_bytes=machine.budget_bytes,
        fits=problem is None and _fits(machine, estimate),
        step_time_s=step_time_s,
        run_time_s=None if step_time_s is None or steps is None else steps * step_time_s,
        checkpointing=[_alternative(machine, cost, choice) for choice in choices],
        problem=problem,
    )


def _alternative(machine: Machine, cost: StepCost, plan: MemoryPlan) -> Alternative:
    estimate = cost.memory(plan)
    return Alternative(
        checkpointed_layers=plan.checkpointed_layers,
        activation_bytes=estimate.activations,
        peak_bytes=estimate.peak_bytes,
        fits=_fits(machine, estimate),
        step_time_s=cost.seconds(plan) if machine.peak_flops is not None else None,
    )


def _fits(machine: Machine, estimate: MemoryEstimate) -> bool:
    return machine.budget_bytes is None or estimate.peak_bytes <= machine.budget_bytes
