"""`truthgpt eval`: how good a trained model is, on its validation split, on other data, and on tasks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from truthgpt.cli.components import loaded_plugins
from truthgpt.cli.output import emit_json, print_table, say
from truthgpt.errors import ConfigError

if TYPE_CHECKING:
    from truthgpt.config.schema import Config
    from truthgpt.evaluation_data import EvaluationData
    from truthgpt.harness_tasks import TaskResults
    from truthgpt.load_model import LoadedModel
    from truthgpt.trainers.evaluate import Evaluation


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to evaluate.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Other data, all of which is evaluated: data.path=FILE ..."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML or preset that names the data; default: the run's own.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAME[,NAME]", help="loss, ppl, bits_per_byte ...; default: the data's own.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK[,TASK]", help="Tasks of the lm-evaluation-harness, by lm_eval.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --tasks: a folder of task files (YAML).")
    ] = None,
    allow_task_code: Annotated[
        bool, typer.Option("--allow-task-code", help="Let task files name functions, which runs their code.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Evaluate a run's model, a checkpoint or a Hugging Face folder: on its validation split, other data, or tasks."""
    if tasks is None and (include_path is not None or allow_task_code):
        raise ConfigError("--include-path and --allow-task-code are read with --tasks only; leave them out")
    names = _names(tasks, "--tasks")
    from truthgpt.evaluation_data import evaluation_data, names_data, own_config
    from truthgpt.runtime.run_log import attach_console, detach

    given, chosen = overrides or [], _names(metrics, "--metrics")
    on_data = tasks is None or config is not None or metrics is not None or names_data(given)
    # A folder that is no run has no data of its own, and tasks need none: any configuration says where to compute.
    base = config if on_data or own_config(target) is not None else "llm_default"
    console = attach_console(logging.INFO)
    try:
        data = evaluation_data(target, base, given, chosen or None, loaded_plugins())
        from truthgpt.build import frozen_cast
        from truthgpt.load_model import load_model
        from truthgpt.runtime.device import choose_device

        device = choose_device(data.config.hardware.device)
        loaded = load_model(target, device, cast=frozen_cast(data.config, device))
        document: dict[str, Any] = {}
        if on_data:
            evaluation = _on_data(data, loaded)
            document |= {"metrics": evaluation.values, "tokens": evaluation.tokens}
        if names:
            document["tasks"] = _on_tasks(loaded, target, names, include_path, allow_task_code, data.config)
    finally:
        detach(console)
    if json_output:
        emit_json(document)
    else:
        _show(document, "images" if loaded.tokenizer is None else "tokens")


def _on_data(data: EvaluationData, loaded: LoadedModel) -> Evaluation:
    from truthgpt.build import build_evaluation
    from truthgpt.evaluation_data import fit_context
    from truthgpt.models.architecture import context_length
    from truthgpt.trainers.evaluate import Evaluator

    say(f"evaluating {data.what}")
    config = fit_context(data, context_length(loaded.model.config))
    parts = build_evaluation(config, loaded)
    evaluator = Evaluator(
        parts.eval_loader, parts.metrics, config.eval.select_best_by, parts.objective, parts.precision
    )
    evaluation = evaluator.run(loaded.model)
    assert evaluation is not None  # nothing asks it to stop
    return evaluation


def _on_tasks(
    loaded: LoadedModel, target: Path, names: list[str], include_path: Path | None, allow_code: bool, config: Config
) -> TaskResults:
    from truthgpt.harness_tasks import run_tasks

    if loaded.tokenizer is None:
        raise ConfigError(f"--tasks: {target} is a {type(loaded.model).__name__}, and tasks are for text; leave it out")
    return run_tasks(loaded, names, include_path, allow_code, config.training.eval_batch_size)


def _names(given: str | None, option: str) -> list[str]:
    if given is None:
        return []
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise ConfigError(f"{option} {given!r}: give names with commas between them")
    return names


def _show(document: dict[str, Any], unit: str) -> None:
    if "metrics" in document:
        for name, value in document["metrics"].items():
            typer.echo(f"{name:16} {value:.4f}")
        typer.echo(f"{unit:16} {document['tokens']}")
    if "tasks" in document:
        rows = []
        for task, values in document["tasks"].items():
            for key, value in values.items():
                metric, _, which = key.partition(",")
                rows.append([task, metric, which, "none" if value is None else f"{value:.4f}"])
        print_table(["task", "metric", "filter", "value"], rows)
