"""Measures training as it is configured: the first steps of the real run, timed, and nothing of it kept. Layer 4."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truthgpt.build import Components, build_components
from truthgpt.build_trainer import build_trainer
from truthgpt.callbacks.base import CallbackList, StateView
from truthgpt.config.schema import Config, ResumeConfig
from truthgpt.data.base import GlobalBatch, TrainLoader
from truthgpt.errors import OutOfMemoryError
from truthgpt.runtime.device import describe_hardware
from truthgpt.runtime.environment import package_versions
from truthgpt.runtime.flops import peak_flops, training_flops_per_token
from truthgpt.runtime.matmul_speed import MatmulSpeed, measure_matmul_speed
from truthgpt.runtime.run_directory import RunDirectory
from truthgpt.trainers.no_checkpoints import NoCheckpoints
from truthgpt.trainers.trainer import GenericTrainer

logger = logging.getLogger(__name__)

WINDOWS = 8
"""Windows that a measurement is cut into at least; also the fewest steps it can have."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Window:
    """Steps `first_step` to `last_step` (from 1), measured together: the device is waited for at both ends."""

    first_step: int
    last_step: int
    tokens: int
    """Supervised tokens trained on."""
    seconds: float
    loss: float
    """Mean over the tokens."""

    @property
    def steps(self) -> int:
        """Optimizer steps in the window."""
        return self.last_step - self.first_step + 1


@dataclass(frozen=True)
class Spread:
    """The middle of several measurements, and the outermost ones."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Start:
    """Seconds until training is under way."""

    build_s: float
    """Data, model, probes, and compiling where it is probed."""
    first_step_s: float
    """From there to the end of step 1: loader processes and kernels start, what is left to compile is compiled."""
    to_first_step_s: float
    """From the start of the process to the end of step 1, imports included."""


@dataclass(frozen=True)
class Memory:
    """Most memory torch held on the GPU, from the start of the process to the last step."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True)
class Batches:
    """What was trained on."""

    packed: bool
    samples: int
    """Rows, or packed rows."""
    tokens: int
    """Supervised ones."""
    positions: int
    """Tokens, supervised or not, and padding."""
    attention_length: float | None
    """Mean length that a position attends within: of a document in packed rows (the padding at a row's end is one),
    of the padded row elsewhere; None for images."""


@dataclass(frozen=True)
class Arithmetic:
    """Model FLOPs of the useful tokens (no recomputation, no padding) against what the machine can do; None: unknown.

    Attention is counted as causal, within `Batches.attention_length`.
    """

    flops_per_token: float | None
    flops_per_s: float | None
    matmul: MatmulSpeed
    share_of_matmul: float | None
    peak_flops_per_s: float | None
    """From the data sheet."""
    share_of_peak: float | None


@dataclass(frozen=True)
class TrainBenchmark:
    """What was measured. Speeds are those of the full windows in the last half of the steps."""

    steps: int
    unit: str
    """What `tokens` counts: `tokens` or `images`."""
    tokens_per_s: Spread
    step_ms: Spread
    start: Start
    memory: Memory | None
    """None without a CUDA device."""
    batches: Batches
    arithmetic: Arithmetic
    compiled: bool
    precision: str
    windows: list[Window]
    fallbacks: list[dict[str, str]]
    hardware: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, nested as the records are."""
        return dataclasses.asdict(self)


def benchmark_training(config: Config, steps: int | None, process_started_s: float) -> TrainBenchmark:
    """Train the first `steps` optimizer steps of `config` and say how fast they were.

    Everything is built for the run as configured (its length decides whether compiling pays); only then it is cut
    short. Data loading, logging to a file, averaging and guards are part of it. Evaluation, checkpoints, the exported
    model and callbacks are not; the run directory is a temporary one.

    Args:
        config: a valid configuration.
        steps: optimizer steps, at least `WINDOWS`; None: one epoch.
        process_started_s: when this process started, by `time.perf_counter`.

    Raises:
        ConfigError, DataError, NonFiniteError, OutOfMemoryError: see their exit codes.
        ValueError: too few steps, or an epoch of a stream, whose length is not known.
    """
    build_started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="truthgpt-benchmark-") as folder:
        config = config.model_copy(update={"output_dir": folder, "resume": ResumeConfig()})
        with RunDirectory.claim(Path(folder), resume=False, overwrite=False) as run:
            try:
                components = build_components(config)
                trainer = build_trainer(config, components, run)
            except torch.OutOfMemoryError as error:
                message = f"out of memory while building the model: {str(error).splitlines()[0]}"
                raise OutOfMemoryError(f"{message} Choose a smaller model, or free the device") from error
            steps = steps or components.train_loader.steps_per_epoch
            if steps is None or steps < WINDOWS:
                raise ValueError(f"at least {WINDOWS} steps are needed, not {steps}")
            recorder, loader = _Recorder(components.task.unit), _ObservedLoader(components.train_loader)
            built_s = time.perf_counter()
            _shortened(trainer, steps, recorder, loader).train()
    first_step_ended_s = recorder.first_step_ended_s
    start = Start(
        build_s=built_s - build_started_s,
        first_step_s=first_step_ended_s - built_s,
        to_first_step_s=first_step_ended_s - process_started_s,
    )
    return _result(components, steps, start, recorder, loader.describe(recorder.windows))


def window_steps(steps: int) -> int:
    """Steps a full window has when `steps` are measured."""
    return max(1, steps // WINDOWS)


def steady_windows(windows: Sequence[Window], steps: int) -> list[Window]:
    """The full windows in the last half of `steps`: compiling, autotuning and the first allocations are behind them."""
    return [window for window in windows if window.first_step > steps // 2 and window.steps == window_steps(steps)]


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model is compiled in place."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


class _Recorder:
    """A callback that notes what every log line marks the end of, when the device has been waited for."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self.windows: list[Window] = []
        self.memory: Memory | None = None
        self.first_step_ended_s = 0.0
        self._step = self._tokens = 0
        self._start_s = 0.0

    def on_start(self, state: StateView, info: Mapping[str, Any]) -> None:
        """The first step begins."""
        self._start_s = time.perf_counter()

    def on_log(self, state: StateView, info: Mapping[str, Any]) -> None:
        """A window ends here, the next one begins."""
        now_s = time.perf_counter()
        window = Window(
            self._step + 1, state.step, state.tokens - self._tokens, now_s - self._start_s, float(info["loss"])
        )
        self.windows.append(window)
        if state.step == 1:
            self.first_step_ended_s = now_s
        if "peak_memory_bytes" in info:
            self.memory = Memory(info["peak_memory_bytes"], torch.cuda.max_memory_reserved())
        speed = window.tokens / window.seconds
        logger.info("step %d/%d: loss %.4f, %.0f %s/s", state.step, state.max_steps, window.loss, speed, self._unit)
        self._step, self._tokens, self._start_s = state.step, state.tokens, time.perf_counter()


class _ObservedLoader:
    """A loader that remembers the shapes of the batches it hands on."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self._shapes: list[tuple[torch.Size, torch.Tensor | None]] = []
        self._samples = 0
        self.steps_per_epoch = loader.steps_per_epoch

    def batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """As the loader's own."""
        with closing(self._loader.batches(start_step)) as batches:
            for batch in batches:
                self._samples += batch.samples
                self._shapes += [(each["labels"].shape, each.get("cu_seq_lens")) for each in batch.micro_batches]
                yield batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """As the loader's own."""
        return self._loader.state_dict(step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As the loader's own."""
        self._loader.load_state_dict(state)

    def describe(self, windows: Sequence[Window]) -> Batches:
        """What was handed on, and trained on in `windows`."""
        positions, squares, packed = 0, 0, False
        for shape, cu_seq_lens in self._shapes:
            positions += shape.numel()
            if cu_seq_lens is not None:
                packed = True
                squares += int((cu_seq_lens.diff().long() ** 2).sum())
            else:
                squares += shape.numel() * shape[-1]
        is_text = all(len(shape) == 2 for shape, _ in self._shapes)
        tokens = sum(window.tokens for window in windows)
        return Batches(packed, self._samples, tokens, positions, squares / positions if is_text else None)


def _shortened(trainer: GenericTrainer, steps: int, recorder: _Recorder, loader: _ObservedLoader) -> GenericTrainer:
    """The same engine, data and meter for `steps` steps, with nothing evaluated, saved, exported or told to anyone."""
    store = trainer.parts.checkpoints
    parts = dataclasses.replace(
        trainer.parts,
        loader=loader,
        evaluator=None,
        checkpoints=NoCheckpoints(store.folder, run_id=store.run_id, keep_last=store.keep_last),
        callbacks=CallbackList([("benchmark", recorder)]),
        sample=lambda: [],
        export=lambda path: None,
    )
    settings = dataclasses.replace(
        trainer.settings,
        max_steps=steps,
        log_interval=window_steps(steps),
        eval_interval=steps,
        checkpoint_interval=steps,
        max_tokens=None,
        max_time_s=None,
    )
    return GenericTrainer(parts, settings)


def _result(components: Components, steps: int, start: Start, recorder: _Recorder, batches: Batches) -> TrainBenchmark:
    steady = steady_windows(recorder.windows, steps)
    tokens_per_s = Spread.of([window.tokens / window.seconds for window in steady])
    per_token = components.task.flops_per_token
    if batches.attention_length is not None:  # the task counts a whole row, and packed documents do not see all of it
        per_token = training_flops_per_token(components.model, round(batches.attention_length))
    precision = components.precision.name
    return TrainBenchmark(
        steps=steps,
        unit=components.task.unit,
        tokens_per_s=tokens_per_s,
        step_ms=Spread.of([1000 * window.seconds / window.steps for window in steady]),
        start=start,
        memory=recorder.memory,
        batches=batches,
        arithmetic=compare_with_ceiling(per_token, tokens_per_s.median, components.device, precision),
        compiled=is_compiled(components.model),
        precision=precision,
        windows=recorder.windows,
        fallbacks=components.fallbacks.to_json(),
        hardware=describe_hardware(components.device),
        versions=package_versions(),
    )


def compare_with_ceiling(
    flops_per_token: float | None, tokens_per_s: float, device: torch.device, precision: str
) -> Arithmetic:
    """Measure how fast `device` multiplies matrices now, and what share of that training uses.

    Args:
        flops_per_token: arithmetic of training on one useful token.
        tokens_per_s: useful tokens.
        precision: `bf16`, `fp16` or `none`.
    """
    flops_per_s = None if flops_per_token is None else flops_per_token * tokens_per_s
    matmul = measure_matmul_speed(device, _DTYPES.get(precision, torch.float32))
    peak = peak_flops(device, precision)
    return Arithmetic(
        flops_per_token=flops_per_token,
        flops_per_s=flops_per_s,
        matmul=matmul,
        share_of_matmul=None if flops_per_s is None else flops_per_s / matmul.flops_per_s,
        peak_flops_per_s=peak,
        share_of_peak=None if flops_per_s is None or peak is None else flops_per_s / peak,
    )
