"""`truthgpt train`: validate, claim the run directory, build, train, say what is next."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truthgpt.cli.components import loaded_plugins
from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, load_listed_plugins
from truthgpt.cli.output import emit_json, say, split_arguments
from truthgpt.config.changes import compare_configs
from truthgpt.errors import CheckpointError, ConfigError, OutOfMemoryError, Problem

if TYPE_CHECKING:
    from truthgpt.config.load import RawConfig
    from truthgpt.config.schema import Config
    from truthgpt.runtime.run_directory import RunDirectory
    from truthgpt.runtime.stop_signal import StopSignal
    from truthgpt.trainers.trainer import GenericTrainer

_LENGTH = ("max_steps", "epochs", "max_tokens", "max_time_s", "early_stopping_patience")
"""Keys of `training` that say how long a run is."""


def train(
    arguments: ConfigArguments = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|never|PATH", help="Go on from a checkpoint; wins over resume.* of the YAML."),
    ] = None,
    allow_plugins: AllowPlugins = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move a used run directory aside, start fresh.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="The final status as one JSON document on stdout.")
    ] = False,
) -> None:
    """Train what CONFIG (a YAML file or a preset; default: the built-in llm_default) describes."""
    from truthgpt.runtime.run_directory import RunDirectory
    from truthgpt.runtime.run_log import attach_console, detach
    from truthgpt.runtime.stop_signal import StopSignal

    console = attach_console(logging.INFO)
    try:
        raw, config = _load(arguments or [], resume, allow_plugins)
        _refuse_missing_checkpoint(config)
        folder = Path(config.run_directory)
        with RunDirectory.claim(folder, resume=config.resume.enabled, overwrite=overwrite) as run, StopSignal() as stop:
            status = run.written_status  # of a command that fails before the run begins, no earlier one is the status
            try:
                _train(raw, config, run, stop)
                status = run.read_status
            finally:
                if json_output and (final := status()) is not None:
                    emit_json(final)
    finally:
        detach(console)


def _load(arguments: list[str], resume: str | None, allow_plugins: bool) -> tuple[RawConfig, Config]:
    from truthgpt.config.load import load_raw
    from truthgpt.validate_config import validate_config

    source, overrides = split_arguments(arguments)
    raw = load_raw(source, [*overrides, *_resume_overrides(resume)])
    load_listed_plugins(raw, allow_plugins)
    return raw, validate_config(raw, loaded_plugins())


def _resume_overrides(resume: str | None) -> list[str]:
    """`--resume` says the same as `resume.*`, and wins."""
    if resume is None:
        return []
    if resume in ("auto", "never"):
        return [f"resume={{enabled: {str(resume == 'auto').lower()}}}"]
    return [f"resume={json.dumps({'enabled': True, 'checkpoint_dir': resume})}"]


def _refuse_missing_checkpoint(config: Config) -> None:
    """A misspelt `--resume PATH`, before the data is read for it, and for a run that is complete too."""
    named = config.resume.checkpoint_dir
    if config.resume.enabled and named is not None and not Path(named).exists():
        raise CheckpointError(
            f"resume: {named} does not exist; give a checkpoint (.pt), a folder of them or a run directory, or auto "
            f"for the newest of this run"
        )


def _train(raw: RawConfig, config: Config, run: RunDirectory, stop: StopSignal) -> None:
    """Train in a claimed run directory."""
    from truthgpt.runtime.run_log import attach_run_log, detach

    if config.resume.enabled:
        runs = dict.fromkeys((run.path.absolute(), *_run_of_checkpoint(config)))
        changed = dict.fromkeys(change for folder in runs for change in _accepted_changes(raw, config, folder))
        if _is_complete(run, config):
            say(f"{run.path}: already complete; nothing to do")
            _say_next(config, run)
            return
        if changed:
            say(f"resuming with changed settings: {', '.join(changed)}")
    log = attach_run_log(run.log)
    try:
        with stop.breaking_off():
            trainer = _build(raw, config, run, stop)
        trainer.train()
    finally:
        detach(log)
    _say_next(config, run)


def _build(raw: RawConfig, config: Config, run: RunDirectory, stop: StopSignal) -> GenericTrainer:
    """The slow part of starting: torch, transformers, data and model."""
    import torch

    from truthgpt.build import build_components
    from truthgpt.build_trainer import build_trainer

    try:
        return build_trainer(config, build_components(config), run, stop, raw.origins)
    except ConfigError as error:
        raise ConfigError([_located(problem, raw) for problem in error.problems]) from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of memory while building the model: {str(error).splitlines()[0]} Choose a smaller model, or free the "
            f"device (hardware.device names another)"
        ) from error


def _located(problem: Problem, raw: RawConfig) -> Problem:
    """Give a mistake that only building could find the file and line of its key."""
    return raw.problem(tuple(problem.key.split(".")), problem.message, problem.suggestion) if problem.key else problem


def _run_of_checkpoint(config: Config) -> list[Path]:
    """The directory of the run that `resume.checkpoint_dir` is of, where it stands in one."""
    if config.resume.checkpoint_dir is None:
        return []
    given = Path(config.resume.checkpoint_dir).absolute()
    return [folder for folder in (given, *given.parents[:2]) if (folder / "checkpoints").is_dir()][:1]


def _is_complete(run: RunDirectory, config: Config) -> bool:
    """Whether the directory's run already did what this configuration asks for: not where it is to go on from a
    checkpoint that is named, which may be an earlier one."""
    if config.resume.checkpoint_dir is not None and Path(config.resume.checkpoint_dir).is_file():
        return False
    status, saved = run.read_status(), _saved_config(run.path)
    if status is None or saved is None or status.get("state") != "complete":
        return False
    old, new = saved["training"], config.training.model_dump()
    if all(old.get(key, default) == new[key] for key, default in _defaults(*_LENGTH).items()):
        return True
    step = status.get("step")
    return config.training.max_steps is not None and isinstance(step, int) and config.training.max_steps <= step


def _defaults(*keys: str) -> dict[str, Any]:
    """Of keys of `training`: what a run did without the keys that are newer than it."""
    from truthgpt.config.schema import TrainingConfig

    values = TrainingConfig().model_dump()
    return {key: values[key] for key in keys}


def _accepted_changes(raw: RawConfig, config: Config, folder: Path) -> list[str]:
    """What changed since the run in `folder` started and may; a resume that would continue another run is refused."""
    saved = _saved_config(folder)
    if saved is None:
        return []
    changes = compare_configs(saved, config.model_dump(mode="json"))
    if changes.refused:
        raise ConfigError([_located(problem, raw) for problem in changes.refused])
    return changes.said


def _saved_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the run in `folder`; None where there is none. ConfigError when it is damaged."""
    from truthgpt.config.load import load_raw

    path = folder / "config.yaml"
    if not path.is_file():
        return None
    saved = load_raw(path).data
    training = saved.get("training")
    sizes = ("train_batch_size", "grad_accum_steps")
    if not isinstance(training, Mapping) or not all(isinstance(training.get(key), int) for key in sizes):
        message = "is damaged: it is not the configuration of a run"
        fix = "put the run's own back, or delete it: then a resume does not look for what changed"
        raise ConfigError([Problem(key="", message=f"{path} {message}", suggestion=fix)])
    return saved


def _say_next(config: Config, run: RunDirectory) -> None:
    folder = shlex.quote(config.run_directory)
    commands = {}
    if config.model.task == "causal_lm":
        prompt = config.generate.prompts[0] if config.generate.prompts else "Once upon a time"
        if "chat" in (config.data.format, *(source.format for source in config.data.sources)):
            commands[f"truthgpt chat {folder}"] = "talk with the model; also: demo, serve"
        else:
            commands[f"truthgpt generate {folder} --prompt {shlex.quote(prompt)}"] = "write with the model"
    if (run.read_status() or {}).get("best_metric") is not None:  # something was held out
        commands[f"truthgpt eval {folder}"] = "its metrics on the validation split"
    commands[f"truthgpt runs list {shlex.quote(str(Path(config.run_directory).parent))}"] = "all runs"
    program = _program()
    lines = {command.replace("truthgpt", program, 1): what for command, what in commands.items()}
    width = max(map(len, lines))
    say("\nNext:\n" + "\n".join(f"  {command:{width}}  {what}" for command, what in lines.items()))


def _program() -> str:
    """How this program is called: by its name, or as it was where the shell does not find that, as behind `make train`
    with an environment that is not activated."""
    called = Path(sys.argv[0])
    return "truthgpt" if called.name != "truthgpt" or shutil.which("truthgpt") else shlex.quote(str(called))
