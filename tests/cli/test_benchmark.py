"""`truthgpt benchmark train`: what is printed, the JSON, and the exit codes."""

from __future__ import annotations

import pytest
from tests.process import Cli
from tests.sample_data import write_sources


@pytest.fixture
def base(cli: Cli) -> Cli:
    """The `cli` in a folder with data and `base.yaml`."""
    write_sources(cli.folder)
    return cli


def test_table(base: Cli) -> None:
    shown = base("benchmark", "train", "base.yaml", "--steps", "8")
    assert shown.exit_code == 0, shown.stderr
    names = {line.split("  ")[0] for line in shown.stdout.splitlines()}
    assert {"tokens/s", "ms a step", "device", "measured", "start", "ceiling", "model FLOPs", "share", "loss"} <= names
    assert "8 steps in windows of 1, 2,048 tokens (100.0% of the" in shown.stdout
    assert "step 8/8: loss" in shown.stderr
    assert not (base.folder / "runs").exists()


def test_json(base: Cli) -> None:
    found = base("benchmark", "train", "base.yaml", "seed=8", "--steps", "16", "--json").json
    assert found["steps"] == 16 and len(found["windows"]) == 9
    assert found["batches"]["tokens"] == 16 * 256
    assert found["tokens_per_s"]["lowest"] <= found["tokens_per_s"]["median"] <= found["tokens_per_s"]["highest"]
    assert found["start"]["to_first_step_s"] > 0
    assert found["hardware"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("base.yaml", "--steps", "3"), 2, "--steps"),
        (("base.yaml", "traning.lr=1"), 2, "did you mean training?"),
        (("base.yaml", "data.path=missing.txt"), 3, "missing.txt"),
        (("base.yaml", "training.learning_rate=1e38", "guards.max_consecutive_skips=1"), 5, "consecutive"),
    ],
)
def test_exit_codes(base: Cli, arguments: tuple[str, ...], exit_code: int, said: str) -> None:
    finished = base("benchmark", "train", *arguments)
    assert finished.exit_code == exit_code, finished.stderr
    assert said in finished.stderr and finished.stdout == ""


def test_fallbacks_are_told(base: Cli) -> None:
    shown = base("benchmark", "train", "base.yaml", "training.mixed_precision=fp16", "--steps", "8")
    assert shown.exit_code == 0, shown.stderr
    assert "training.mixed_precision: none, " in shown.stdout
