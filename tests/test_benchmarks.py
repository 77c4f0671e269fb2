"""The benchmark scripts run: with tiny sizes, the measurements of a process of their own in this one."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.sample_data import write_sources
from truthgpt.factories.optimizer import OPTIMIZERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = (
    *("--mb", "0.1", "--vocab-size", "300", "--batches", "5", "--pairs", "1"),
    *("--text-mb", "0.2", "--stream-steps", "150"),
)
SMALL_RUN = (
    *("data.source=text", "data.path=corpus.txt", "data.max_seq_len=32", "data.num_workers=0"),
    *("model.tokenizer.type=byte", "model.tokenizer.vocab_size=null"),
    "model.config={model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 16, n_positions: 32}",
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script; the working folder is the test's own, with small data files in it."""
    torch.set_num_threads(1)
    write_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in {"data", "data_measurements", "cpu_overhead", "byte_order_baseline", "optimizers"} & (
        set(sys.modules) - before
    ):
        del sys.modules[name]


@pytest.fixture
def measure_data(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs sections of `data.py`; figures by name."""
    script, measurements = load("data"), load("data_measurements")
    # `datasets` puts a copy in its place when it maps in processes, in which the cache would stay for all later tests.
    monkeypatch.setattr(os, "environ", os.environ)

    def measure(name: str, work: Any, cache: str) -> Any:
        monkeypatch.setenv("TRUTHGPT_CACHE_DIR", str(work.folder / cache))
        return json.loads(json.dumps(measurements.MEASUREMENTS[name](work)))

    def run(*arguments: str) -> dict[str, dict[str, Any]]:
        script.main([*TINY, *arguments, "--json"])
        return {figure["name"]: figure for figure in json.loads(capsys.readouterr().out)["figures"]}

    monkeypatch.setattr(measurements, "measure", measure)
    return run


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("tokenise", {"from rows, ratio", "from the file, ratio"}),
        ("loader", {"0 workers, ratio", "2 workers, ratio"}),
        ("startup", {"warm, s", "warm, peak MB", "cold, s", "cold, peak MB"}),
        ("stream", {"resumed - fresh, s", "steps/s on the way there"}),
    ],
)
def test_data_section(measure_data: Callable[..., dict[str, Any]], section: str, names: set[str]) -> None:
    figures = measure_data("--only", section, "--pairs", "2" if section == "stream" else "1")
    assert set(figures) == names
    assert all(figure["section"] == section for figure in figures.values())
    assert all(figure["value"] > 0 for name, figure in figures.items() if "fresh" not in name and "MB" not in name)


def test_data_packing(measure_data: Callable[..., dict[str, Any]]) -> None:
    figures = measure_data("--only", "packing")
    for length in (512, 1024):
        ways = {way: figures[f"{way}, T={length}"] for way in ("padding", "bucketing", "packing")}
        assert ways["padding"]["value"] < ways["bucketing"]["value"] < ways["packing"]["value"] <= 1
        assert ways["packing"]["met"] is True
        assert ways["packing"]["detail"].startswith("1 shapes")
        assert ways["padding"]["met"] is None


def test_data_packing_of_a_file(measure_data: Callable[..., dict[str, Any]]) -> None:
    figures = measure_data("--only", "packing", "--rows", "pairs.jsonl", "--vocab-size", "260")
    assert figures["packing, T=512"]["value"] > figures["padding, T=512"]["value"]


def test_data_table(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("data")
    figures = [script.Figure("loader", "0 workers, ratio", 0.5, ">= 0.9", False, "1 against 2 samples/s")]
    monkeypatch.setitem(script.SECTIONS, "loader", lambda work: figures)
    script.main(["--only", "loader"])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["section", "figure", "value", "goal", "met", "detail"]
    assert " ".join(line.split()) == "loader 0 workers, ratio 0.500 >= 0.9 NO 1 against 2 samples/s"


@pytest.mark.soak
def test_data_in_processes_of_their_own(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    load("data").main([*TINY, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert len(document["figures"]) == 16
    assert set(document["versions"]) >= {"torch", "datasets"}


def test_data_measurement_that_fails(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    work = load("data_measurements").Work(tmp_path, 1, 1.0, 300, 5, None, "prompt", "completion", 1.0, 10)
    with pytest.raises(SystemExit, match="no_such_measurement failed"):
        load("data_measurements").measure("no_such_measurement", work, "cache")


def test_byte_order_baseline(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "data.source=text", "data.path=corpus.txt", "--json"])
    load("byte_order_baseline").main()
    document = json.loads(capsys.readouterr().out)
    size = Path("corpus.txt").stat().st_size
    joins = document["train_documents"] + document["validation_documents"] - 2  # the NUL bytes between documents
    assert document["train_bytes"] + document["validation_bytes"] == size + joins
    bits = list(document["bits_per_byte"].values())
    assert bits == sorted(bits, reverse=True)
    assert 0 < bits[-1] < bits[0] < 8


@pytest.mark.parametrize("kind", ["run_ours", "run_plain"])
def test_cpu_overhead(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    script = load("cpu_overhead")
    whole = script.overrides
    monkeypatch.setattr(script, "overrides", lambda steps, folder: [*whole(steps, folder), *SMALL_RUN])
    steps = script.WARM_UP_STEPS + 2
    assert getattr(script, kind)(steps) > 0


def test_optimizers(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    script = load("optimizers")
    assert set(script.CONTENDERS) == set(OPTIMIZERS.names())
    small = [*SMALL_RUN, "data.validation_fraction=0.1", "--steps", str(script.WARM_UP_STEPS + 4)]
    script.main([*small, "--only", "adamw", "muon", "--seeds", "2", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    for row, state_bytes in zip(rows, (8.0, 8.0), strict=True):
        assert 0 < row["state_bytes_per_parameter"] <= state_bytes + 0.1
        assert len(row["sweep"]) == 3 and len(row["val_losses"]) == 2
        assert row["val_losses"][0] == min(row["sweep"].values())
        assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert rows[1]["state_bytes_per_parameter"] < rows[0]["state_bytes_per_parameter"], "muon keeps one average"


def test_optimizers_table_leaves_out_what_is_not_installed(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("optimizers")
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    monkeypatch.setattr(script, "train", lambda *_: script.Run(2.0, 8.0, 1.25, 9.0))
    script.main(["--only", "adamw", "schedule_free"])
    printed = capsys.readouterr()
    assert "schedule_free: left out: the package schedulefree" in printed.err
    assert printed.out.splitlines()[2:] == ["| `adamw` | 0.001 | 2.000 (2.000, 2.000) | 8.0 | 1.2 of 9 |"]


def test_generation(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("generate")
    numbers = script.random.Random(0)
    tiny = {"one": ([script.prompt(numbers, 9)], [5]), "two": ([script.prompt(numbers, n) for n in (3, 20)], [7, 4])}
    monkeypatch.setattr(script, "loads", lambda: tiny)
    script.main(["--pairs", "1", "--threads", "1", "--json", str(tmp_path / "out.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["load"] for record in records] == ["one", "two"]
    for record in records:
        their, our = record["tokens_per_s"]["transformers"], record["tokens_per_s"]["ours"]
        assert record["ratio"]["median"] == pytest.approx(our / their)
