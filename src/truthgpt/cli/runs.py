"""`truthgpt runs`: what the run directories in a folder hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from truthgpt.cli.output import emit_json
from truthgpt.errors import ConfigError
from truthgpt.runtime.metrics_log import read_last
from truthgpt.runtime.run_directory import is_in_use, is_run_directory, read_status

runs_app = typer.Typer(help="Look at run directories.", no_args_is_help=True)

_COLUMNS = ("name", "state", "step", "best", "tokens/s", "updated")
_NOTHING = "-"


@runs_app.callback()
def runs() -> None:
    """Look at run directories."""


@runs_app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of run directories.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the runs in a folder, the last updated first."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a run directory, or a folder of them")
    rows = collect_runs(folder)
    if as_json:
        emit_json(rows)
    elif rows:
        typer.echo(_table(rows))
    else:
        typer.echo(f"no runs in {folder}" if folder.is_dir() else f"no runs: {folder} does not exist")


def collect_runs(folder: Path) -> list[dict[str, Any]]:
    """One row a run directory directly in `folder` (or `folder` itself): name, path, status.json, `best_by` (the metric
    that `best_metric` is), `tokens_per_sec`.

    A run whose status says "running" while nobody holds its directory is "stopped"; without a readable status.json it
    is "unknown".
    """
    if not folder.is_dir():
        return []
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    rows = [_describe(path) for path in places if is_run_directory(path)]
    return sorted(rows, key=lambda row: (row["updated_at"] or "", row["name"]), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    keys = ("run_id", "state", "step", "max_steps", "best_metric", "best_step", "exit_code", "updated_at", "message")
    row: dict[str, Any] = {"name": path.resolve().name, "path": str(path), **dict.fromkeys(keys)}
    row |= {key: value for key, value in (read_status(path) or {}).items() if key in keys}
    row["state"] = row["state"] or "unknown"
    if row["state"] == "running" and not is_in_use(path):
        row["state"] = "stopped"
    row["best_by"] = _best_by(path)
    row["tokens_per_sec"] = read_last(path / "metrics.jsonl", "tokens_per_sec")
    return row


def _best_by(run: Path) -> str | None:
    """The metric that the best of the run is chosen by; None where its configuration cannot be read."""
    from truthgpt.config.load import load_raw

    try:
        section = load_raw(run / "config.yaml").data.get("eval")
    except ConfigError:
        return None
    return str(section["select_best_by"]) if isinstance(section, dict) and "select_best_by" in section else None


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step = _NOTHING if row["step"] is None else f"{row['step']}/{row['max_steps']}"
    metric = "" if row["best_by"] is None else f"{row['best_by']} "
    best = _NOTHING if row["best_metric"] is None else f"{metric}{row['best_metric']:.4g} @ {row['best_step']}"
    speed = _NOTHING if row["tokens_per_sec"] is None else f"{row['tokens_per_sec']:,.0f}"
    return (row["name"], row["state"], step, best, speed, row["updated_at"] or _NOTHING)
