"""The memory half of build: what a step of a configuration takes, how much memory there is, and the plan. Layer 4."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from truthgpt.build_data import bucket_bins, rows_per_micro_batch
from truthgpt.config.data_section import DataConfig
from truthgpt.config.schema import Config
from truthgpt.factories.memory import MEMORY_POLICIES
from truthgpt.factories.registry import accepts
from truthgpt.memory.activations import fake_model, measure_activations, one_line_an_error
from truthgpt.memory.base import MemoryEstimate, MemoryPlan, Recut, TrainingCost
from truthgpt.memory.estimate import Head, Held, StepMemory
from truthgpt.models.adapted_linear import share_inputs
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm, transformers_attention
from truthgpt.models.lora import LoraSettings, add_adapters, require_peft
from truthgpt.models.output_head import PROBE_TOKENS, output_head
from truthgpt.models.tokenizer import byte_tokenizer, load_tokenizer
from truthgpt.optim.groups import parameter_groups
from truthgpt.optim.state_bytes import ASSUMED_BYTES, optimizer_bytes
from truthgpt.runtime.compile import compile_pays, decoder_layers, estimated_run_s
from truthgpt.runtime.device import free_memory_bytes
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.flops import matrix_weights, peak_flops, training_flops_per_token
from truthgpt.runtime.precision import hold_frozen_in_bf16, hold_weights_in_bf16
from truthgpt.trainers.checkpoint import glance_at_state

logger = logging.getLogger(__name__)

MARGIN = 0.06
"""Share of the free memory that is left free: for what the allocator cannot use, and for the estimate's error."""
UTILISATION = {True: 0.52, False: 0.40}
"""Share of the data sheet's peak that a step reaches with layers compiled or not; on one H200, docs/performance.md."""
HOST_S_PER_LAYER = {True: 1e-3, False: 2.8e-3}
"""Time the CPU takes to launch a layer's forward and backward: a micro-batch is not faster, however small it is."""
FLOPS_PER_BYTE = 250.0
"""Peak arithmetic to memory traffic of a GPU, about: 206 on an H200, 295 on an H100, 156 on an A100."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4: four bits, a byte of scale for 64 of them, and a float32 for 256 scales."""
ASSUMED_PEAK_FLOPS = 1e14
"""Where the peak is not known; plans are then compared, and no time is told."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. `peak_flops` and `budget_bytes`: None where they are not known."""

    device_type: str
    precision: str
    peak_flops: float | None
    budget_bytes: int | None


@dataclass(frozen=True)
class StepCost:
    """See `memory.base.TrainingCost`; what the planned model is beside it."""

    step: StepMemory
    compiled: bool
    samples: int
    parameters: int
    trainable_parameters: int
    flops_per_token: float
    forward_flops_per_token: float
    """Of the decoder layers: what checkpointing repeats."""
    peak_flops: float | None

    @property
    def layers(self) -> int:
        """Decoder layers that can be checkpointed."""
        return self.step.layers

    @property
    def mostly_frozen(self) -> bool:
        """See `memory.base.TrainingCost`."""
        return 2 * self.trainable_parameters < self.parameters

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step."""
        return self.samples * self.step.length

    def memory(self, plan: MemoryPlan) -> MemoryEstimate:
        """Bytes at the peak of a step."""
        return self.step.estimate(plan)

    def seconds(self, plan: MemoryPlan) -> float:
        """Arithmetic at the share of the peak that is reached, or launching where that takes longer, and traffic."""
        peak = self.peak_flops or ASSUMED_PEAK_FLOPS
        recomputed = min(plan.checkpointed_layers, self.layers)
        flops_per_token = self.flops_per_token + recomputed / self.layers * self.forward_flops_per_token
        arithmetic_s = self.tokens_per_step * flops_per_token / (UTILISATION[self.compiled] * peak)
        # A forward pass is a third of a layer's work.
        launching_s = plan.grad_accum_steps * (self.layers + recomputed / 3) * HOST_S_PER_LAYER[self.compiled]
        held = self.step.held
        added = 3 * (plan.grad_accum_steps - 1) * held.summed_gradients
        updated = 2 * (held.weights + held.optimizer + held.average) + held.gradients
        return max(arithmetic_s, launching_s) + (added + updated) * FLOPS_PER_BYTE / peak


@dataclass(frozen=True)
class PlannedMemory:
    """The plan of a run. `peak_bytes`: None where it is not known; `may_change`: whether a run that is out of memory
    goes on with a smaller plan."""

    plan: MemoryPlan
    peak_bytes: int | None
    may_change: bool


def plan_memory(config: Config, device: torch.device, precision_name: str, fallbacks: Fallbacks) -> PlannedMemory:
    """The plan of `model.memory.policy` for a run on `device`.

    Raises:
        ConfigError: see `load_architecture`.
        OutOfMemoryError: no way to cut up a step fits.
    """
    machine = machine_of(device, precision_name)
    cost: TrainingCost | None = None
    if accepts(MEMORY_POLICIES.entry(config.model.memory.policy).build, "cost"):
        cost = _cost_or_none(config, machine, fallbacks)
    plan = choose_plan(config, machine, cost, _previous_plan(config))
    peak_bytes = None if cost is None else cost.memory(plan).peak_bytes
    return PlannedMemory(plan, peak_bytes, config.model.memory.policy == "adaptive" and cuts_freely(config.data))


def _previous_plan(config: Config) -> MemoryPlan | None:
    """That of the checkpoint which the run will go on from; None: there is none, or one without a plan."""
    if not config.resume.enabled:
        return None
    state = glance_at_state(Path(config.resume.checkpoint_dir or config.run_directory))
    plan = None if state is None else state.get("plan")
    return None if plan is None else MemoryPlan(**plan)


def cuts_freely(data: DataConfig) -> bool:
    """Whether samples can be cut into other micro-batches; with buckets those are what the order is made of."""
    return bucket_bins(data) is None and data.max_tokens is None


def machine_of(device: torch.device, precision_name: str) -> Machine:
    """What `device` has free, and how fast it is."""
    free = free_memory_bytes(device)
    budget = None if free is None else usable_bytes(free)
    return Machine(device.type, precision_name, peak_flops(device, precision_name), budget)


def usable_bytes(free: int) -> int:
    """What a plan may take of free memory."""
    return round(free * (1 - MARGIN))


def choose_plan(config: Config, machine: Machine, cost: TrainingCost | None, previous: MemoryPlan | None) -> MemoryPlan:
    """What the policy makes of `cost`.

    Args:
        previous: the plan of the run that is resumed.
    """
    wanted, data = config.model.memory, config.data
    recut: Recut = "any" if machine.device_type == "cuda" and data.packing is not False else "smaller"
    if not cuts_freely(data):
        recut = "never"
    plan: MemoryPlan = MEMORY_POLICIES.build(
        wanted.policy,
        wanted.model_extra,
        train_batch_size=rows_per_micro_batch(config),
        grad_accum_steps=config.training.grad_accum_steps,
        gradient_checkpointing=config.model.gradient_checkpointing,
        cost=cost,
        budget_bytes=machine.budget_bytes,
        recut=recut,
        previous=previous,
    )
    return plan


def _cost_or_none(config: Config, machine: Machine, fallbacks: Fallbacks) -> StepCost | None:
    if config.model.task != "causal_lm":
        return None  # image classifiers train as the YAML says
    try:
        return step_cost(config, machine)
    except (RuntimeError, NotImplementedError) as error:
        reason = f"a step of this model cannot be counted: {str(error).strip().splitlines()[0]}"
        if config.model.memory.policy == "adaptive":
            fallbacks.take("model.memory.policy", "adaptive", "the YAML's own numbers", reason)
        else:
            logger.info("whether a step fits into memory is not known: %s", reason)
        return None


def step_cost(config: Config, machine: Machine) -> StepCost:
    """What a step of a text model takes: its model is made without storage, and run once for every way to count.

    Raises:
        ConfigError: see `load_architecture`.
        RuntimeError, NotImplementedError: the model computes with values that are not known without running it.
    """
    architecture = load_architecture(config.model.name_or_path, config.model.config, config.model.trust_remote_code)
    if config.model.name_or_path is None:
        architecture.vocab_size = config.model.config.get("vocab_size") or _vocabulary_size(config)
    mode, model = fake_model(lambda: _model(config, architecture, machine.precision))
    if config.model.lora.enabled:
        with mode, one_line_an_error():
            share_inputs(model, torch.zeros((1, PROBE_TOKENS), dtype=torch.long))
    length, trainable = config.data.max_seq_len, [p for p in model.parameters() if p.requires_grad]
    flops = training_flops_per_token(model, length)
    compiled = _compiles(config, machine, flops)
    head, half = output_head(model), machine.precision != "none"
    activations = measure_activations(mode, model, length, half, compiled)
    layers = decoder_layers(model)
    in_layers = [p for layer in layers for p in layer.parameters()]
    trained_in_layers = sum(p.numel() for p in in_layers if p.requires_grad)
    held = Held(
        weights=_weight_bytes(config, model, layers),
        gradients=sum(p.numel() * p.element_size() for p in trainable),
        summed_gradients=sum(4 * p.numel() for p in trainable),
        layer_share=trained_in_layers / sum(p.numel() for p in trainable),
        optimizer=_state_bytes(config, model, sum(p.numel() for p in trainable)),
        average=sum(4 * p.numel() for p in trainable) if config.ema.enabled and not config.ema.on_cpu else 0,
    )
    weight = model.get_output_embeddings().weight if head is None else head.weight
    width = int(weight.shape[1])
    described = Head(
        vocab=int(weight.shape[0]),
        width=width,
        trained=weight.requires_grad,
        weight_bytes=weight.element_size(),
        compute_bytes=2 if half else 4,
        hidden_bytes=round(activations.layer_input_row / (length * width)),
        whole_logits=head is None,
    )
    inside = {id(p) for p in in_layers}
    return StepCost(
        step=StepMemory(len(layers), length, machine.device_type, compiled, held, activations, described),
        compiled=compiled,
        samples=rows_per_micro_batch(config) * config.training.grad_accum_steps,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in trainable),
        flops_per_token=flops,
        forward_flops_per_token=sum(2.0 * p.numel() for p, _ in matrix_weights(model) if id(p) in inside),
        peak_flops=machine.peak_flops,
    )


def _model(config: Config, architecture: PreTrainedConfig, precision: str) -> PreTrainedModel:
    """The model as it is trained: with its adapters, and its weights in the types the run keeps them in."""
    lora, half = config.model.lora, precision == "bf16"
    attention = transformers_attention(architecture)
    model = build_causal_lm(
        architecture, attention, config.seed, torch.bfloat16 if lora.enabled and half else torch.float32
    )
    if lora.enabled:
        require_peft()
        settings = LoraSettings(lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.method)
        add_adapters(model, settings, None, config.seed)
    if config.training.weights != "float32" and half:
        hold_weights_in_bf16(model, sum_in_float32=False)
    elif lora.enabled and half:
        hold_frozen_in_bf16(model)
    return model


def _vocabulary_size(config: Config) -> int:
    """Of the tokenizer of a model from scratch, which may not be there yet; a `bpe` one has at most what is asked."""
    wanted = config.model.tokenizer
    if wanted.type == "bpe":
        assert wanted.vocab_size is not None  # validation asked for it
        return wanted.vocab_size
    if wanted.type == "path":
        assert wanted.path is not None
        return len(load_tokenizer(wanted.path, config.model.trust_remote_code))
    return len(byte_tokenizer())


def _weight_bytes(config: Config, model: PreTrainedModel, layers: list[nn.Module]) -> int:
    """Parameters and buffers; the layers' frozen matrices in four bits where the base is quantised."""
    held: int = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if config.model.lora.quantization == "none":
        return held
    frozen = [p for layer in layers for p in layer.parameters() if p.ndim == 2 and not p.requires_grad]
    saved: float = sum(p.numel() * (p.element_size() - NF4_BYTES) for p in frozen)
    return held - round(saved)


def _state_bytes(config: Config, model: PreTrainedModel, trainable: int) -> int:
    groups = parameter_groups(model, config.training.weight_decay)
    known = optimizer_bytes(config.optimizer.type, groups, config.training.weights)
    return ASSUMED_BYTES * trainable if known is None else known


def _compiles(config: Config, machine: Machine, flops_per_token: float) -> bool:
    """Whether layers are compiled, as far as it is known before the data is read: of epochs it is not, and eager
    layers take more."""
    training = config.training
    tokens = rows_per_micro_batch(config) * training.grad_accum_steps * config.data.max_seq_len
    run_s = estimated_run_s((training.max_steps or 0) * tokens * flops_per_token, machine.peak_flops)
    return compile_pays(training.torch_compile, torch.device(machine.device_type), run_s)
