"""`truthgpt eval`: the metrics of a trained model on a validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truthgpt.cli.components import loaded_plugins
from truthgpt.cli.output import emit_json
from truthgpt.errors import ConfigError


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT|HF_DIR", help="What to evaluate.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]")] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML or preset that names the data; default: the run's own.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Evaluate a run's model, a checkpoint or a Hugging Face folder on the validation split of a configuration."""
    from truthgpt.load_model import load_model
    from truthgpt.runtime.device import choose_device
    from truthgpt.validate_config import load_config

    resolved = load_config(config or _own_config(target), overrides or [], loaded_plugins())
    loaded = load_model(target, choose_device(resolved.hardware.device))

    from truthgpt.build import build_evaluation
    from truthgpt.trainers.evaluate import Evaluator

    parts = build_evaluation(resolved, loaded)
    evaluator = Evaluator(
        parts.eval_loader, parts.metrics, resolved.eval.select_best_by, parts.objective, parts.precision
    )
    evaluation = evaluator.run(loaded.model)
    assert evaluation is not None  # nothing asks it to stop
    if json_output:
        emit_json({"metrics": evaluation.values, "tokens": evaluation.tokens})
        return
    for name, value in evaluation.values.items():
        typer.echo(f"{name:16} {value:.4f}")
    unit = "images" if loaded.tokenizer is None else "tokens"
    typer.echo(f"{unit:16} {evaluation.tokens}")


def _own_config(target: Path) -> str:
    for folder in (target, target.parent, target.parent.parent):
        if (folder / "config.yaml").is_file():
            return str(folder / "config.yaml")
    raise ConfigError(f"{target} lies in no run directory: name the data with --config YAML")
