"""Config -> Components: with the other `build_` modules the only caller of the factories.

Order: device, memory plan, the task (`build_text`, `build_images`: source, tokenizer, model, loaders), compile,
optimizer, schedule. In-place changes to the model happen here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.build_data import build_eval_loader
from truthgpt.build_images import build_image_data, build_image_eval_loader, build_image_task
from truthgpt.build_memory import PlannedMemory, plan_memory
from truthgpt.build_sources import build_text_data
from truthgpt.build_text import build_text_task, choose_loss, share_adapter_inputs
from truthgpt.config.schema import Config
from truthgpt.data.base import TrainLoader
from truthgpt.data.chat import load_chat_template
from truthgpt.data.loader import EvalLoader
from truthgpt.errors import ConfigError, DataError, Problem
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.kv_cache import KV_CACHES
from truthgpt.factories.metrics import METRICS
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.scheduler import SCHEDULERS
from truthgpt.inference.open_engine import open_engine
from truthgpt.kv_cache.base import KVCachePolicy
from truthgpt.kv_cache.none import NoKVCache
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.load_model import LoadedModel
from truthgpt.memory.base import MemoryPlan
from truthgpt.metrics.base import Metric
from truthgpt.models.causal_lm import quiet_transformers
from truthgpt.models.image_classifier import image_classification_loss
from truthgpt.models.image_processor import pixel_format_of
from truthgpt.models.trained_weights import has_adapters
from truthgpt.optim.groups import parameter_groups
from truthgpt.runtime.compile import can_replay, compile_layers, compile_pays, decoder_layers, estimated_run_s
from truthgpt.runtime.device import choose_device, configure_backends
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.float8 import Recipe, float8_obstacle, multiply_in_float8
from truthgpt.runtime.flops import peak_flops
from truthgpt.runtime.onednn import multiply_by_onednn
from truthgpt.runtime.precision import (
    Precision,
    choose_precision,
    has_native_bf16,
    hold_frozen_in_bf16,
    hold_weights_in_bf16,
)
from truthgpt.runtime.seeds import random_state_kept
from truthgpt.task import TaskParts
from truthgpt.trainers.engine import Objective

IMAGES = "image_classification"


@dataclass(frozen=True)
class Components:
    """Everything a run is made of, built and ready."""

    device: torch.device
    precision: Precision
    memory: PlannedMemory
    task: TaskParts
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    max_steps: int
    metrics: list[Metric]
    callbacks: list[tuple[str, object]]
    kv_cache: KVCachePolicy
    cuda_graph: bool
    fallbacks: Fallbacks

    @property
    def plan(self) -> MemoryPlan:
        """How a step is cut up."""
        return self.memory.plan

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained."""
        return self.task.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None for a task without text."""
        return self.task.tokenizer

    @property
    def train_loader(self) -> TrainLoader:
        """Global batches of every step."""
        return self.task.train_loader

    @property
    def eval_loader(self) -> EvalLoader | None:
        """Validation batches; None when nothing is held out."""
        return self.task.eval_loader


@dataclass(frozen=True)
class EvaluationComponents:
    """What evaluating a finished model needs of a configuration."""

    eval_loader: EvalLoader
    metrics: list[Metric]
    objective: Objective
    precision: Precision


def build_components(config: Config) -> Components:
    """Build everything `config` names.

    Raises:
        ConfigError: a name or value that only the libraries or the machine can refuse.
        DataError: the data cannot be read.
    """
    quiet_transformers()
    fallbacks = Fallbacks(config.strict)
    device = choose_device(config.hardware.device)
    configure_backends(device, config.training.allow_tf32, config.hardware.deterministic)
    precision = choose_precision(config.training.mixed_precision, device, fallbacks)
    callbacks = _build_callbacks(config, fallbacks)
    memory = plan_memory(config, device, precision.name, fallbacks)
    optimizer = _choose_optimizer(config, fallbacks)
    build_task = build_image_task if config.model.task == IMAGES else build_text_task
    task = build_task(config, memory.plan, device, precision, fallbacks)
    max_steps = _max_steps(config, task)
    precision = _hold_weights(config, task.model, memory.plan, precision, fallbacks)
    cuda_graph = _compile(config, task, precision, max_steps, fallbacks)
    return Components(
        device=device,
        precision=precision,
        memory=memory,
        task=task,
        optimizer=_build_optimizer(config, task.model, *optimizer),
        schedule=_build_schedule(config, max_steps),
        max_steps=max_steps,
        metrics=_build_metrics(config, task.tokenizer),
        callbacks=callbacks,
        kv_cache=_build_kv_cache(config, task, fallbacks),
        cuda_graph=cuda_graph,
        fallbacks=fallbacks,
    )


def build_evaluation(config: Config, loaded: LoadedModel) -> EvaluationComponents:
    """The validation split of `config` as `loaded` reads it, and its metrics.

    Raises:
        ConfigError: the configuration is for another task than the model's.
        DataError: the data cannot be read, or nothing is held out for validation.
    """
    fallbacks = Fallbacks(config.strict)
    device = choose_device(config.hardware.device)
    configure_backends(device, config.training.allow_tf32, config.hardware.deterministic)
    if (config.model.task == IMAGES) != (loaded.tokenizer is None):
        message = f"{config.model.task}, and the model is a {type(loaded.model).__name__}"
        raise ConfigError([Problem(key="model.task", message=message, suggestion="name its own data with --config")])
    if loaded.tokenizer is None:
        data = build_image_data(config, list(loaded.model.config.id2label.values()))
        pixels = pixel_format_of(loaded.model.config, str(loaded.folder))
        loader = build_image_eval_loader(config, data, pixels, device, fallbacks)
    else:
        if config.data.chat_template is not None:
            loaded.tokenizer.chat_template = load_chat_template(config.data.chat_template)
        loader = build_eval_loader(config, build_text_data(config), loaded.tokenizer, False, device, fallbacks)
    if loader is None:
        raise DataError("nothing to evaluate: set data.validation_fraction above 0, or data.validation_path")
    precision = choose_precision(config.training.mixed_precision, device, fallbacks)
    if has_adapters(loaded.model):  # computed as they were trained, so that the figures are those of the run
        share_adapter_inputs(loaded.model)
        precision = hold_frozen_in_bf16(loaded.model) if precision.name == "bf16" else precision
    objective = image_classification_loss if loaded.tokenizer is None else choose_loss(loaded.model, fallbacks)
    _multiply_on_cpu(loaded.model, precision)
    return EvaluationComponents(loader, _build_metrics(config, loaded.tokenizer), objective, precision)


def frozen_cast(config: Config, device: torch.device) -> Callable[[PreTrainedModel], None]:
    """For `load_model`: makes what is frozen below adapters bf16, where `config` evaluates it so on `device`."""
    half = config.training.mixed_precision == "bf16" and has_native_bf16(device)

    def cast(model: PreTrainedModel) -> None:
        if half and has_adapters(model):
            hold_frozen_in_bf16(model)

    return cast


def _max_steps(config: Config, task: TaskParts) -> int:
    """`training.max_steps`, or the epochs' worth of them, which a stream does not know (validation asked for it)."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    assert task.train_loader.steps_per_epoch is not None
    return config.training.epochs * task.train_loader.steps_per_epoch


def _hold_weights(
    config: Config, model: PreTrainedModel, plan: MemoryPlan, precision: Precision, fallbacks: Fallbacks
) -> Precision:
    """Keep the trained weights as `training.weights` says, and those below adapters in the type the run computes in,
    once nothing needs them in float32 any more; the run's precision."""
    wanted = config.training.weights
    if wanted == "float32":
        return hold_frozen_in_bf16(model) if has_adapters(model) and precision.name == "bf16" else precision
    if precision.name != "bf16":
        fallbacks.take("training.weights", wanted, "float32", f"the run computes in {precision.name}")
        return precision
    return hold_weights_in_bf16(model, sum_in_float32=plan.grad_accum_steps > 1)


def _build_kv_cache(config: Config, task: TaskParts, fallbacks: Fallbacks) -> KVCachePolicy:
    """The cache of the samples; whether the model can use a paged one is seen here, not an hour later by the first."""
    cache = config.model.kv_cache
    policy: KVCachePolicy = KV_CACHES.build(cache.type, cache.model_extra, block_size=cache.block_size)
    if task.tokenizer is None or not config.generate.prompts or not isinstance(policy, PagedKVCache):
        return policy
    # Of one block: all that an engine measures, and none of the memory that its cache takes.
    with open_engine(task.model, task.tokenizer, policy, fallbacks, lengths=[1]) as engine:
        return policy if engine.load().cache_tokens else NoKVCache(keeps=True)


def _build_callbacks(config: Config, fallbacks: Fallbacks) -> list[tuple[str, object]]:
    wanted = {component.type: component.options for component in config.training.callbacks}
    for name in list(wanted):
        availability = CALLBACKS.entry(name).probe()
        if not availability.available:
            used = availability.fallback or "nothing"
            fallbacks.take("training.callbacks", name, used, availability.reason or "not available")
            del wanted[name]
            if availability.fallback is not None:
                wanted.setdefault(availability.fallback, {})
    return [(name, CALLBACKS.build(name, options)) for name, options in wanted.items()]


def _compile(config: Config, task: TaskParts, precision: Precision, max_steps: int, fallbacks: Fallbacks) -> bool:
    """Compile the layers, when that pays, with their products in float8 where that is asked for; whether forward and
    backward are to be replayed as a CUDA graph."""
    training, model = config.training, task.model
    run_flops = max_steps * task.tokens_per_step * (task.flops_per_token or 0.0)
    eager_run_s = estimated_run_s(run_flops, peak_flops(model.device, precision.name))
    compiled = compile_pays(training.torch_compile, model.device, eager_run_s)
    if training.float8 != "none":
        _multiply_in_float8(training.float8, model, compiled, precision, fallbacks)
    if not compiled:
        _multiply_on_cpu(model, precision)
        return False
    mode, graph = training.compile_mode, training.compile_mode == "reduce-overhead"
    if graph:
        mode = "default"  # the graph is ours: torch's own is recorded layer by layer, and again for every shape
        graph = can_replay(model.device, task.fixed_shapes, training.detect_anomaly, fallbacks)

    def probe() -> None:
        batch = {key: tensor.to(model.device) for key, tensor in task.example.items()}
        with random_state_kept(), precision.autocast():
            loss, _ = task.objective(model.train(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    if not compile_layers(model, mode, task.fixed_shapes, probe, fallbacks):
        _multiply_on_cpu(model, precision)
    return graph


def _multiply_on_cpu(model: PreTrainedModel, precision: Precision) -> None:
    if model.device.type == "cpu" and precision.name == "none":
        multiply_by_onednn(model)


def _multiply_in_float8(
    recipe: Recipe, model: PreTrainedModel, compiled: bool, precision: Precision, fallbacks: Fallbacks
) -> None:
    reason = float8_obstacle(model.device)
    if reason is None and precision.name != "bf16":
        reason = f"the run computes in {precision.name}"
    if reason is None and not compiled:
        reason = "its casts are slow in layers that are not compiled (training.torch_compile)"
    if reason is None and not multiply_in_float8(decoder_layers(model), recipe):
        reason = "no linear layer of the model has sizes that float8 takes"
    if reason is not None:
        fallbacks.take("training.float8", recipe, "none", reason)


def _choose_optimizer(config: Config, fallbacks: Fallbacks) -> tuple[str, dict[str, Any]]:
    """Name and options of the optimizer, or of what stands in for it on this machine."""
    wanted, options = config.optimizer.type, config.optimizer.options
    availability = OPTIMIZERS.entry(wanted).probe()
    if availability.available:
        return wanted, options
    reason, used = availability.reason or "not available", availability.fallback
    if used is None:
        raise ConfigError([Problem(key="optimizer.type", message=f"{wanted}: {reason}")])
    fallbacks.take("optimizer.type", wanted, used, reason)
    known = OPTIMIZERS.entry(used).options.model_fields
    return used, {name: value for name, value in options.items() if name in known}


def _build_optimizer(
    config: Config, model: PreTrainedModel, name: str, options: dict[str, Any]
) -> torch.optim.Optimizer:
    training = config.training
    return cast(
        torch.optim.Optimizer,
        OPTIMIZERS.build(
            name,
            options,
            params=parameter_groups(model, training.weight_decay),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=config.optimizer.fused and training.fused_adamw,
            weights=training.weights,
            seed=config.seed,
        ),
    )


def _build_schedule(config: Config, max_steps: int) -> Callable[[int], float]:
    schedule: Callable[[int], float] = SCHEDULERS.build(
        config.training.scheduler.type,
        config.training.scheduler.options,
        total_steps=max_steps,
        warmup_steps=round(config.training.warmup_ratio * max_steps),
    )
    return schedule


def _build_metrics(config: Config, tokenizer: PreTrainedTokenizerFast | None) -> list[Metric]:
    """The metrics of `eval.metrics`; `loss` is always among them."""
    names = {component.type: component.options for component in config.eval.metrics}
    return [METRICS.build(name, options, tokenizer=tokenizer) for name, options in {"loss": {}, **names}.items()]
