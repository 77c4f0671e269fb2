"""What the peers share: the same model, the same samples, the same schedule, and the same way to measure.

A peer gets its samples ready-made, as token ids in memory, in the order of our loader; tokenising is not timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from contender import STARTED_S, Arguments, load
from documents import Documents
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.benchmark_train import (
    Batches,
    Memory,
    Spread,
    Start,
    TrainBenchmark,
    Window,
    compare_with_ceiling,
    steady_windows,
    window_steps,
)
from truthgpt.config.schema import Config
from truthgpt.data.base import IGNORED_LABEL, Batch, Sample
from truthgpt.data.collate import LMCollator
from truthgpt.factories.scheduler import SCHEDULERS
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm, fit_vocabulary, quiet_transformers
from truthgpt.runtime.device import choose_device, configure_backends, describe_hardware
from truthgpt.runtime.environment import package_versions
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.flops import training_flops_per_token
from truthgpt.runtime.precision import choose_precision


@dataclass(frozen=True)
class Peer:
    """All that a peer's own training loop needs.

    Attributes:
        lora: the model has adapters, which alone are trained.
        rows: rows a micro-batch.
        schedule: factor on the learning rate of every optimizer step, from 0.
    """

    config: Config
    device: torch.device
    precision: str
    model: Any  # a PreTrainedModel, or peft's around it
    lora: bool
    tokenizer: PreTrainedTokenizerFast
    documents: Documents
    samples: list[Sample]
    rows: int
    steps: int
    schedule: Callable[[int], float]

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return self.config.training.grad_accum_steps


def build_peer(arguments: Arguments, rows: int | None, bf16_weights: bool) -> Peer:
    """Data and model of a workload.

    Args:
        rows: rows a micro-batch; None: the workload's own.
        bf16_weights: train in bf16 weights instead of float32 ones under autocast.
    """
    quiet_transformers()
    # Peers do not pack.
    config = load(arguments, [*arguments.overrides, "data.packing=false"])
    device = choose_device(config.hardware.device)
    configure_backends(device, config.training.allow_tf32, config.hardware.deterministic)
    documents = Documents(config)
    model = _build_model(config, documents.tokenizer, device, arguments.workload.lora)
    if bf16_weights:
        _to_bf16(model)
    rows = rows or arguments.workload.peer_rows or config.training.train_batch_size
    step_rows = rows * config.training.grad_accum_steps
    steps = arguments.steps or math.ceil(len(documents) / step_rows)
    return Peer(
        config=config,
        device=device,
        precision=choose_precision(config.training.mixed_precision, device, Fallbacks()).name,
        model=model,
        lora=arguments.workload.lora,
        tokenizer=documents.tokenizer,
        documents=documents,
        samples=documents.take(len(documents) if arguments.steps is None else steps * step_rows),
        rows=rows,
        steps=steps,
        schedule=_build_schedule(config),
    )


def _build_model(config: Config, tokenizer: PreTrainedTokenizerFast, device: torch.device, lora: bool) -> Any:
    """The model that we train, with transformers' own attention and the weights that our seed gives on this device.

    With adapters, peft's in its defaults on a frozen bf16 model.
    """
    architecture = load_architecture(None, config.model.config, False)
    fit_vocabulary(architecture, tokenizer, config.model.config.get("vocab_size"))
    with device:
        model = build_causal_lm(architecture, "sdpa", config.seed, torch.bfloat16 if lora else torch.float32)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    wanted = config.model.lora
    adapters = LoraConfig(
        r=wanted.r,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def _to_bf16(model: PreTrainedModel) -> None:
    """The weights in place; not the buffers, since rotary frequencies in bf16 would blur far positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _build_schedule(config: Config) -> Callable[[int], float]:
    training = config.training
    assert training.max_steps is not None
    schedule: Callable[[int], float] = SCHEDULERS.build(
        training.scheduler.type,
        training.scheduler.options,
        total_steps=training.max_steps,
        warmup_steps=round(training.warmup_ratio * training.max_steps),
    )
    return schedule


@dataclass
class PeerCollator:
    """Pads to the longest row, as everybody does, and counts what it hands on, micro-batch by micro-batch.

    `labels` are the tokens to predict, so they are handed on as `shift_labels` too: transformers then shifts nothing,
    and every one of them counts, as with us.

    Attributes:
        masked: hand on an attention mask, which padded rows come with; without padding a peer is faster off without.
    """

    pad_token_id: int
    masked: bool
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """`input_ids`, `labels`, `shift_labels` and perhaps `attention_mask`, int64 `(B, T)`."""
        batch = LMCollator(self.pad_token_id)(samples)
        labels = batch["labels"]
        self.tokens.append(int((labels != IGNORED_LABEL).sum()))
        self.positions.append(labels.numel())
        self.samples.append(len(samples))
        batch["shift_labels"] = labels
        if self.masked:
            lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
            batch["attention_mask"] = (torch.arange(labels.shape[1]) < lengths[:, None]).long()
        return batch


class StepClock:
    """Notes time, memory and loss at the ends of the same windows as ours."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.losses: dict[int, float] = {}
        self.memory: Memory | None = None
        self._device = device
        self._ends: dict[int, float] = {}
        self._start_s = 0.0

    def start(self) -> None:
        """The first step begins."""
        self._start_s = time.perf_counter()

    def ends_window(self, step: int) -> bool:
        """Whether a window ends with `step` (from 1)."""
        return step in (1, self.steps) or step % window_steps(self.steps) == 0

    def step_ended(self, step: int) -> None:
        """Step `step` is launched; at the end of a window the device is waited for."""
        if not self.ends_window(step):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.memory = Memory(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        self._ends[step] = time.perf_counter()

    @property
    def first_step_ended_s(self) -> float:
        """When step 1 was done."""
        return self._ends[1]

    def windows(self, tokens_of_step: Callable[[int], int]) -> list[Window]:
        """All windows; `tokens_of_step` tells the supervised tokens of a step (from 1)."""
        found, first_step, start_s = [], 1, self._start_s
        for step, end_s in sorted(self._ends.items()):
            tokens = sum(tokens_of_step(each) for each in range(first_step, step + 1))
            found.append(Window(first_step, step, tokens, end_s - start_s, self.losses.get(step, math.nan)))
            first_step, start_s = step + 1, end_s
        return found


def measure(peer: Peer, collator: PeerCollator, clock: StepClock, built_s: float, compiled: bool) -> TrainBenchmark:
    """The figures of a training that is over, in the form of ours.

    Args:
        built_s: when model and data were there, by `time.perf_counter`.
    """

    def of_step(counts: list[int], step: int) -> int:
        return sum(counts[(step - 1) * peer.accumulation : step * peer.accumulation])

    def trained(counts: list[int]) -> int:
        return sum(counts[: peer.steps * peer.accumulation])

    windows = clock.windows(lambda step: of_step(collator.tokens, step))
    steady = steady_windows(windows, peer.steps)
    tokens_per_s = Spread.of([window.tokens / window.seconds for window in steady])
    lengths = [len(sample["input_ids"]) for sample in peer.samples]
    length = sum(n * n for n in lengths) / sum(lengths)
    flops_per_token = training_flops_per_token(peer.model, round(length))
    samples, tokens, positions = (trained(each) for each in (collator.samples, collator.tokens, collator.positions))
    return TrainBenchmark(
        steps=peer.steps,
        unit="tokens",
        tokens_per_s=tokens_per_s,
        step_ms=Spread.of([1000 * window.seconds / window.steps for window in steady]),
        start=Start(built_s - STARTED_S, clock.first_step_ended_s - built_s, clock.first_step_ended_s - STARTED_S),
        memory=clock.memory,
        batches=Batches(False, samples, tokens, positions, length),
        arithmetic=compare_with_ceiling(flops_per_token, tokens_per_s.median, peer.device, peer.precision),
        compiled=compiled,
        precision=peer.precision,
        windows=windows,
        fallbacks=[],
        hardware=describe_hardware(peer.device),
        versions=package_versions(),
    )


def record_facts(peer: Peer, same_order: bool) -> dict[str, Any]:
    """What a record says besides the figures: whether samples came in our order, and the tokens of an epoch."""
    return {"same_order": same_order, "epoch_tokens": peer.documents.epoch_tokens()}
