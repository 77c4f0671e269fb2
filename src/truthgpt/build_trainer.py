"""Components -> GenericTrainer. Wiring only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from truthgpt.build import Components
from truthgpt.callbacks.base import CallbackList, StateView
from truthgpt.callbacks.memory_report import MemoryReport
from truthgpt.callbacks.run_status import RunStatusKeeper
from truthgpt.config.load import Origin, resolved_yaml
from truthgpt.config.schema import Config
from truthgpt.config.strict_yaml import KeyPath
from truthgpt.inference.generate import encode_prompt, generate_texts
from truthgpt.inference.open_engine import open_engine
from truthgpt.inference.request import Sampling
from truthgpt.memory.step_down import PlanInUse
from truthgpt.models.causal_lm import count_parameters
from truthgpt.models.trained_weights import has_adapters
from truthgpt.optim.adamw import float32_copy
from truthgpt.runtime.device import describe_hardware
from truthgpt.runtime.environment import describe_environment
from truthgpt.runtime.flops import peak_flops
from truthgpt.runtime.metrics_log import MetricsLog
from truthgpt.runtime.run_directory import RunDirectory
from truthgpt.runtime.seeds import derive_seed
from truthgpt.runtime.stop_signal import StopSignal
from truthgpt.trainers.artefacts import (
    AdapterArtefacts,
    Artefacts,
    ModelArtefacts,
    ModelCard,
    load_exported_weights,
)
from truthgpt.trainers.checkpoint import CheckpointStore, find_checkpoint
from truthgpt.trainers.ema import EMA, KeepsAverage, NoEMA, OptimizerAverage, WeightAverage
from truthgpt.trainers.engine import EngineSettings, TrainEngine
from truthgpt.trainers.evaluate import Evaluator
from truthgpt.trainers.guards import NonFiniteGuard
from truthgpt.trainers.meter import Speed, StepMeter
from truthgpt.trainers.trainer import GenericTrainer, TrainerParts, TrainerSettings


def build_trainer(
    config: Config,
    components: Components,
    run: RunDirectory | None = None,
    stop: StopSignal | None = None,
    origins: Mapping[KeyPath, Origin] | None = None,
) -> GenericTrainer:
    """Wire `components` into a trainer, restored from a checkpoint when `config.resume` asks for it.

    Args:
        run: the claimed run directory, which the caller releases; None claims `config.run_directory` until the
            training ends.
        stop: what SIGTERM and Ctrl-C set; None: nothing stops the run early.
        origins: where each value of `config` came from, for the `config.yaml` of the run.

    Raises:
        RunDirectoryError: the directory is in use, or was used and `resume` is off.
        CheckpointError: resuming, and the checkpoints there are damaged or of another model.
    """
    if run is None:
        run = RunDirectory.claim(Path(config.run_directory), resume=config.resume.enabled, overwrite=False)
        try:
            return _build(config, components, run, [("release", _ReleaseAtEnd(run))], stop, origins)
        except BaseException:
            run.release()
            raise
    return _build(config, components, run, [], stop, origins)


class _ReleaseAtEnd:
    """Lets go of a run directory that no caller holds, as the last callback of all."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def on_end(self, state: StateView, info: Mapping[str, Any]) -> None:
        self._run.release()


def _build(
    config: Config,
    components: Components,
    run: RunDirectory,
    last_callbacks: list[tuple[str, object]],
    stop: StopSignal | None,
    origins: Mapping[KeyPath, Origin] | None,
) -> GenericTrainer:
    engine = _engine(config, components)
    store = CheckpointStore(run.checkpoints, run_id=run.run_id, keep_last=config.checkpoint.keep_last)
    artefacts = _artefacts(config, components, run.model)
    planned_bytes = components.memory.peak_bytes
    report = [] if planned_bytes is None else [("memory", MemoryReport(planned_bytes))]
    parts = TrainerParts(
        engine=engine,
        loader=components.train_loader,
        evaluator=_evaluator(config, components),
        checkpoints=store,
        callbacks=CallbackList([("status", RunStatusKeeper(run)), *report, *components.callbacks, *last_callbacks]),
        metrics_log=MetricsLog(run.metrics),
        meter=StepMeter(components.device, _speed(components)),
        stop=stop or StopSignal(),
        sample=_sampler(config, components),
        export=_exporter(store, components, artefacts),
        facts=_facts(config, components, run),
        plan=PlanInUse(
            components.plan,
            may_change=components.memory.may_change,
            # What adapters share of their inputs cannot be computed again in compiled layers.
            may_checkpoint=not has_adapters(components.model),
        ),
        validation=components.eval_loader.fingerprint if components.eval_loader is not None else None,
    )
    trainer = GenericTrainer(parts, _settings(config, components))
    if config.resume.enabled:
        _restore(config, store, trainer)
    # Only now: a run that cannot be built or resumed, or is interrupted before, leaves the directory as it was.
    parts.stop.remember()
    run.write_config(resolved_yaml(config, origins or {}))
    run.write_environment(describe_environment(components.fallbacks.to_json(), describe_hardware(components.device)))
    artefacts.save_description()
    return trainer


def _artefacts(config: Config, components: Components, folder: Path) -> Artefacts:
    kind = AdapterArtefacts if has_adapters(components.model) else ModelArtefacts
    card = ModelCard(config.run_name, _data_names(config), config.eval.select_best_by, config.seed)
    return kind(folder, components.model, components.task.processor, card, config.training.save_safetensors)


def _data_names(config: Config) -> str:
    """The data sources, for the model card."""
    return ", ".join(item.source for item in config.data.sources) or config.data.source.type


def _engine(config: Config, components: Components) -> TrainEngine:
    return TrainEngine(
        components.model,
        components.task.objective,
        components.optimizer,
        components.schedule,
        components.precision,
        _average(config, components),
        NonFiniteGuard(config.guards.max_consecutive_skips, components.device),
        EngineSettings(
            config.seed, config.training.max_grad_norm, config.training.detect_anomaly, components.cuda_graph
        ),
    )


def _average(config: Config, components: Components) -> WeightAverage:
    optimizer = components.optimizer
    if config.ema.enabled:
        device = torch.device("cpu") if config.ema.on_cpu else None
        return EMA(components.model, config.ema.decay, partial(float32_copy, optimizer), device)
    return OptimizerAverage(components.model, optimizer) if isinstance(optimizer, KeepsAverage) else NoEMA()


def _evaluator(config: Config, components: Components) -> Evaluator | None:
    if components.eval_loader is None:
        return None
    return Evaluator(
        components.eval_loader,
        components.metrics,
        config.eval.select_best_by,
        components.task.objective,
        components.precision,
    )


def _settings(config: Config, components: Components) -> TrainerSettings:
    training = config.training
    return TrainerSettings(
        max_steps=components.max_steps,
        log_interval=training.log_interval,
        eval_interval=training.eval_interval,
        checkpoint_interval=config.checkpoint.interval_steps,
        early_stopping_patience=training.early_stopping_patience,
        max_tokens=training.max_tokens,
        max_time_s=training.max_time_s,
    )


def _speed(components: Components) -> Speed:
    return Speed(components.task.flops_per_token, peak_flops(components.device, components.precision.name))


def _sampler(config: Config, components: Components) -> Callable[[], list[dict[str, str]]]:
    generate = config.generate
    sampling = Sampling(
        max_new_tokens=generate.max_new_tokens,
        temperature=generate.temperature,
        seed=derive_seed(config.seed, "samples"),
    )

    tokenizer = components.tokenizer

    def sample() -> list[dict[str, str]]:
        if tokenizer is None or not generate.prompts:
            return []
        lengths = [len(encode_prompt(tokenizer, text)) + sampling.max_new_tokens for text in generate.prompts]
        with open_engine(
            components.model, tokenizer, components.kv_cache, components.fallbacks, lengths=lengths
        ) as engine:
            texts = generate_texts(engine, tokenizer, generate.prompts, sampling)
            return [{"prompt": text.prompt, "text": text.text} for text in texts]

    return sample


def _exporter(store: CheckpointStore, components: Components, artefacts: Artefacts) -> Callable[[Path], None]:
    def export(checkpoint: Path) -> None:
        payload = store.load(checkpoint)
        load_exported_weights(components.model, payload)
        artefacts.save_weights(payload["state"])

    return export


def _restore(config: Config, store: CheckpointStore, trainer: GenericTrainer) -> None:
    if config.resume.checkpoint_dir is not None:
        trainer.restore(find_checkpoint(Path(config.resume.checkpoint_dir)))
        return
    found = store.latest()
    if found is None:
        trainer.start_over()
    else:
        trainer.restore(found.path)


def _facts(config: Config, components: Components, run: RunDirectory) -> dict[str, Any]:
    total, trainable = count_parameters(components.model)
    return {
        "run_name": config.tracker_run_name,
        "project": config.logging.project,
        "log_dir": config.logging.dir,
        "run_directory": str(run.path),
        "max_steps": components.max_steps,
        "device": str(components.device),
        "precision": components.precision.name,
        "parameters": total,
        "trainable_parameters": trainable,
        "tokens_per_step": components.task.tokens_per_step,
        "full_steps": components.task.fixed_shapes,
        "unit": components.task.unit,
        "config": config.model_dump(mode="json"),
    }
