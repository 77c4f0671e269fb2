"""Config -> Components: with `build_data` the only caller of the factories.

Order: device, architecture, source, tokenizer, model, memory plan, compile, optimizer, schedule. In-place changes to
the model happen here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.attention.install import check_attention, install_attention
from truthgpt.build_data import build_eval_loader, build_split, build_tokenizer, build_train_loader
from truthgpt.config.schema import Config
from truthgpt.data.loader import EvalLoader, GlobalBatchLoader
from truthgpt.errors import DataError
from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.kv_cache import KV_CACHES
from truthgpt.factories.memory import MEMORY_POLICIES
from truthgpt.factories.metrics import METRICS
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.scheduler import SCHEDULERS
from truthgpt.kv_cache.base import KVCachePolicy
from truthgpt.memory.base import MemoryPlan
from truthgpt.metrics.base import Metric
from truthgpt.models.architecture import check_context, load_architecture
from truthgpt.models.causal_lm import (
    build_causal_lm,
    causal_lm_loss,
    check_vocabulary,
    enable_gradient_checkpointing,
    fit_vocabulary,
    load_causal_lm,
    quiet_transformers,
    set_generation_defaults,
)
from truthgpt.optim.groups import parameter_groups
from truthgpt.runtime.compile import compile_layers, compile_pays
from truthgpt.runtime.device import choose_device, configure_backends
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import Precision, choose_precision


@dataclass(frozen=True)
class Components:
    """Everything a run is made of, built and ready."""

    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    plan: MemoryPlan
    train_loader: GlobalBatchLoader
    eval_loader: EvalLoader | None
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    max_steps: int
    metrics: list[Metric]
    callbacks: list[tuple[str, object]]
    kv_cache: KVCachePolicy
    fallbacks: Fallbacks


@dataclass(frozen=True)
class EvaluationComponents:
    """What evaluating a finished model needs of a configuration."""

    eval_loader: EvalLoader
    metrics: list[Metric]
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
    architecture = load_architecture(config.model.name_or_path, config.model.config, config.model.trust_remote_code)
    check_context(architecture, config.data.max_seq_len)
    attention = _install_attention(config, architecture)
    callbacks = _build_callbacks(config, fallbacks)
    plan = _build_plan(config)

    data = build_split(config)
    tokenizer = build_tokenizer(config, data.split.train)
    model = _build_model(config, architecture, attention, tokenizer).to(device)
    if plan.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    train_loader = build_train_loader(config, data, tokenizer, plan, device, fallbacks)
    max_steps = config.training.max_steps or config.training.epochs * train_loader.steps_per_epoch
    _compile(config, model, plan, precision, data.fixed_shapes, max_steps, fallbacks)
    return Components(
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        model=model,
        plan=plan,
        train_loader=train_loader,
        eval_loader=build_eval_loader(config, data, tokenizer, device, fallbacks),
        optimizer=_build_optimizer(config, model),
        schedule=_build_schedule(config, max_steps),
        max_steps=max_steps,
        metrics=_build_metrics(config, tokenizer),
        callbacks=callbacks,
        kv_cache=_build_kv_cache(config),
        fallbacks=fallbacks,
    )


def build_evaluation(config: Config, tokenizer: PreTrainedTokenizerFast) -> EvaluationComponents:
    """The validation split of `config`, tokenised with `tokenizer`, and its metrics.

    Raises:
        DataError: the data cannot be read, or nothing is held out for validation.
    """
    fallbacks = Fallbacks(config.strict)
    device = choose_device(config.hardware.device)
    configure_backends(device, config.training.allow_tf32, config.hardware.deterministic)
    loader = build_eval_loader(config, build_split(config), tokenizer, device, fallbacks)
    if loader is None:
        raise DataError("nothing to evaluate: set data.validation_fraction above 0, or data.validation_path")
    precision = choose_precision(config.training.mixed_precision, device, fallbacks)
    return EvaluationComponents(loader, _build_metrics(config, tokenizer), precision)


def _install_attention(config: Config, architecture: PreTrainedConfig) -> str:
    backend = config.model.attention
    function = ATTENTION_BACKENDS.build(backend.backend, backend.model_extra)
    check_attention(backend.backend, function, architecture, config.data.max_seq_len)
    return install_attention(backend.backend, function)


def _build_plan(config: Config) -> MemoryPlan:
    memory, training = config.model.memory, config.training
    plan: MemoryPlan = MEMORY_POLICIES.build(
        memory.policy,
        memory.model_extra,
        train_batch_size=training.train_batch_size,
        grad_accum_steps=training.grad_accum_steps,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return plan


def _build_kv_cache(config: Config) -> KVCachePolicy:
    cache = config.model.kv_cache
    policy: KVCachePolicy = KV_CACHES.build(cache.type, cache.model_extra, block_size=cache.block_size)
    return policy


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


def _build_model(
    config: Config, architecture: PreTrainedConfig, attention: str, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    wanted = config.model
    if wanted.name_or_path is not None and wanted.init != "scratch":
        check_vocabulary(architecture.vocab_size, len(tokenizer))
        model = load_causal_lm(wanted.name_or_path, architecture, attention, wanted.trust_remote_code)
    else:
        fit_vocabulary(architecture, tokenizer, wanted.config.get("vocab_size"))
        model = build_causal_lm(architecture, attention, config.seed)
    set_generation_defaults(model, tokenizer)
    return model


def _compile(
    config: Config,
    model: PreTrainedModel,
    plan: MemoryPlan,
    precision: Precision,
    fixed_shapes: bool,
    max_steps: int,
    fallbacks: Fallbacks,
) -> None:
    training, length = config.training, config.data.max_seq_len
    total_tokens = max_steps * plan.micro_batch_size * plan.grad_accum_steps * length
    if not compile_pays(training.torch_compile, model.device, total_tokens):
        return

    def probe() -> None:
        ids = torch.zeros(plan.micro_batch_size, length, dtype=torch.long, device=model.device)
        with torch.random.fork_rng(), precision.autocast():
            loss, _ = causal_lm_loss(model.train(), {"input_ids": ids, "labels": ids})
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    compile_layers(model, training.compile_mode, fixed_shapes, probe, fallbacks)


def _build_optimizer(config: Config, model: PreTrainedModel) -> torch.optim.Optimizer:
    training, optimizer = config.training, config.optimizer
    return cast(
        torch.optim.Optimizer,
        OPTIMIZERS.build(
            optimizer.type,
            optimizer.options,
            params=parameter_groups(model, training.weight_decay),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=optimizer.fused and training.fused_adamw,
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


def _build_metrics(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[Metric]:
    """The metrics of `eval.metrics`; `loss` is always among them."""
    names = {component.type: component.options for component in config.eval.metrics}
    return [METRICS.build(name, options, tokenizer=tokenizer) for name, options in {"loss": {}, **names}.items()]
