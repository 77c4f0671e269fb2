"""`truthgpt runs list`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from truthgpt.cli.runs import collect_runs, runs_app
from truthgpt.errors import ConfigError
from truthgpt.runtime.metrics_log import MetricsLog
from truthgpt.runtime.run_directory import RunDirectory, RunStatus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs: complete, running by its status but left by its process, and one without a readable status."""
    for name, state in (("done", "complete"), ("dead", "running"), ("torn", "failed")):
        with RunDirectory.claim(tmp_path / name, resume=False, overwrite=False) as run:
            run.write_status(RunStatus(state, 40, 100, 2.34567, 20))
            MetricsLog(run.metrics).append({"step": 40, "tokens_per_sec": 12345.6})
            MetricsLog(run.metrics).append({"step": 40, "val_loss": 2.0})
    (tmp_path / "torn" / "status.json").write_text('{"sta')
    (tmp_path / "done" / "config.yaml").write_text("eval: {select_best_by: ppl}\n")
    (tmp_path / "torn" / "config.yaml").write_text("eval: {select_")
    for name, time in (("done", "2026-01-01T00:00:00Z"), ("dead", "2026-01-02T00:00:00Z")):
        status = tmp_path / name / "status.json"
        status.write_text(json.dumps({**json.loads(status.read_text()), "updated_at": time}))
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    return tmp_path


def test_the_last_updated_comes_first_and_a_dead_run_is_stopped(folder: Path) -> None:
    rows = collect_runs(folder)
    assert [(row["name"], row["state"]) for row in rows] == [
        ("dead", "stopped"),
        ("done", "complete"),
        ("torn", "unknown"),
    ]
    assert rows[1]["tokens_per_sec"] == 12345.6
    assert [row["best_by"] for row in rows] == [None, "ppl", None]
    assert (rows[1]["step"], rows[1]["max_steps"], rows[1]["best_metric"]) == (40, 100, 2.34567)


def test_a_run_that_is_held_is_running(folder: Path) -> None:
    with RunDirectory.claim(folder / "dead", resume=True, overwrite=False):
        assert collect_runs(folder)[0]["state"] == "running"
    assert collect_runs(folder)[0]["state"] == "stopped"


def test_a_run_directory_lists_itself(folder: Path) -> None:
    assert [row["name"] for row in collect_runs(folder / "done")] == ["done"]


def test_json_is_one_document(folder: Path) -> None:
    result = CliRunner().invoke(runs_app, ["list", str(folder), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == collect_runs(folder)


def test_the_table_is_aligned(folder: Path) -> None:
    result = CliRunner().invoke(runs_app, ["list", str(folder)])
    assert result.stdout.splitlines() == [
        "name  state     step    best            tokens/s  updated",
        "dead  stopped   40/100  2.346 @ 20      12,346    2026-01-02T00:00:00Z",
        "done  complete  40/100  ppl 2.346 @ 20  12,346    2026-01-01T00:00:00Z",
        "torn  unknown   -       -               12,346    -",
    ]


def test_no_runs_is_no_error(tmp_path: Path) -> None:
    assert "no runs in" in CliRunner().invoke(runs_app, ["list", str(tmp_path)]).stdout
    missing = CliRunner().invoke(runs_app, ["list", str(tmp_path / "x")])
    assert missing.exit_code == 0 and "does not exist" in missing.stdout
    assert json.loads(CliRunner().invoke(runs_app, ["list", str(tmp_path), "--json"]).stdout) == []
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(runs_app, ["list", str(tmp_path / "file"), "--json"]).exception
    assert isinstance(refused, ConfigError) and "is a file; give a run directory" in str(refused)
