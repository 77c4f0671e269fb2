"""The comparison with peers runs on a CPU with tiny models: contenders in this process, the chain around them whole."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from truthgpt.runtime import matmul_speed
from truthgpt.validate_config import load_config

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
MODULES = {path.stem for path in GPU.glob("*.py")}
SMALL = ("training.mixed_precision=none", "hardware.device=cpu", "data.num_workers=0", "data.max_seq_len=64")
TEXT = (*SMALL, "data.source=text", "data.path=corpus.txt", "training.train_batch_size=4")
TINY_GPT2 = (
    "model.config={model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64, vocab_size: 300, "
    "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}",
    *TEXT,
)
TINY_LLAMA = (
    "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 600, max_position_embeddings: 1024}",
    *SMALL,
)
Load = Callable[[str], ModuleType]
Record = dict[str, Any]

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="adapters of a peer need peft")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Load]:
    """Imports a script; the working folder is the test's own, with documents in it."""
    torch.set_num_threads(1)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{'It is ' * (n % 7)}{2 * n}."} for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.txt").write_text("\n".join(f"{row['question']} {row['answer']}" for row in rows * 12))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(GPU)
    monkeypatch.setattr(matmul_speed, "CPU_SIZE", 64)
    before = set(sys.modules)
    yield importlib.import_module
    for name in MODULES & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def in_process(load: Load, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load`, with contenders that run in this process: starting another one costs seconds."""

    def run(contender: str, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Record:
        started = {"spawned_unix_s": time.time() - 1.0, "wall_s": 0.1}
        return {**measure(load, contender, *arguments), **started}

    for script in ("compare", "sweep"):
        monkeypatch.setattr(load(script), "run_contender", run)
    return load


def measure(load: Load, contender: str, *arguments: str) -> Record:
    """The one line that a contender prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        load(contender).main(arguments)
    (line,) = printed.getvalue().splitlines()
    found: Record = json.loads(line)
    return found


def only_record(path: str) -> Record:
    (line,) = Path(path).read_text().splitlines()
    found: Record = json.loads(line)
    return found


@needs_accelerate
def test_same_work_as_hf_trainer(in_process: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tokens and the same losses, step by step."""
    options = ("--repeats", "1", "--steps", "16", "--out", "results/w1.jsonl")
    in_process("compare").main(["w1", "--peer", "hf_trainer:default", *options, *TINY_GPT2])
    said = capsys.readouterr().out
    assert "tokens, trained: equal" in said and "ratio " in said
    record = only_record("results/w1.jsonl")
    same = record["summary"]["same"]
    assert same["batches"] and same["tokens_equal"] and same["tokens"]["ours"] == 16 * 4 * 64
    assert same["losses_equal"] and same["largest_loss_difference"] < 1e-4
    ours, peer = (record["runs"][side][0] for side in ("ours", "peer"))
    assert [each["last_step"] for each in ours["windows"]] == [each["last_step"] for each in peer["windows"]]
    assert peer["arithmetic"]["flops_per_token"] == ours["arithmetic"]["flops_per_token"]
    assert record["summary"]["ratio"] == pytest.approx(ours["tokens_per_s"]["median"] / peer["tokens_per_s"]["median"])
    assert record["summary"]["ours"]["to_first_step_s"]["cold"] > 1.0, "counted from the creation of the process"
    assert record["command"].startswith("python benchmarks/gpu/") and record["overrides"] == list(TINY_GPT2)

    in_process("table").main(["results"])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (
        line for line in lines if line.startswith("| GPT-2 124M, T=1024 (changed) | default | hf_trainer:default")
    )
    assert "| equal |" in row and f"**{record['summary']['ratio']:.2f}**" in row


def test_epoch_of_packed_documents(in_process: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed against padded rows: other batches, the same tokens in an epoch."""
    tokenizer = "model.tokenizer={type: bpe, vocab_size: 300}"
    options = ("--epoch", "--repeats", "1", "--data", "pairs.jsonl", "--out", "results/w4.jsonl")
    in_process("compare").main(["w4", "--peer", "plain_loop:eager+rows=8", *options, *TINY_LLAMA, tokenizer])
    assert "tokens, epoch: equal" in capsys.readouterr().out
    record = only_record("results/w4.jsonl")
    ours, peer = (record["runs"][side][0] for side in ("ours", "peer"))
    assert ours["batches"]["packed"] and not peer["batches"]["packed"]
    assert ours["batches"]["tokens"] == peer["batches"]["tokens"] == ours["epoch_tokens"] == peer["epoch_tokens"]
    assert peer["batches"]["samples"] == 80 and peer["steps"] == 10
    assert record["summary"]["same"]["losses_equal"] is None
    assert "data.path" not in json.dumps(ours["overrides"])

    in_process("table").main(["results"])
    said = capsys.readouterr().out
    assert "## One epoch" in said and "## Training speed" not in said


@needs_peft
def test_adapters(in_process: Load) -> None:
    """Other random weights in the adapters, so the losses are near and not equal."""
    options = ("--repeats", "1", "--steps", "8", "--out", "results/w3.jsonl")
    in_process("compare").main(["w3", "--peer", "plain_loop:eager", *options, *TINY_LLAMA[:1], *TEXT])
    record = only_record("results/w3.jsonl")
    (peer,), (ours,) = (record["runs"][side] for side in ("peer", "ours"))
    assert len(peer["windows"]) == len(ours["windows"]) == 8
    assert ours["arithmetic"]["flops_per_token"] == peer["arithmetic"]["flops_per_token"]
    assert record["summary"]["same"]["tokens_equal"] and record["summary"]["ratio"] > 0
    assert ours["windows"][0]["loss"] == pytest.approx(peer["windows"][0]["loss"], rel=0.02)
    in_process("table").main(["results"])


@needs_accelerate
def test_variants_of_hf_trainer(load: Load) -> None:
    options = ("--workload", "w1", "--steps", "8", "--variant", "bf16w+gc+fused+rows=8")
    found = measure(load, "hf_trainer", *options, *TINY_GPT2)
    assert found["batches"]["samples"] == 64 and found["same_order"] and not found["compiled"]
    grouped = measure(load, "hf_trainer", *options[:-1], "grouped", *TINY_GPT2)
    assert not grouped["same_order"]


@pytest.mark.parametrize(
    ("contender", "package"), [("hf_trainer", "accelerate"), ("trl_sft", "trl"), ("plain_loop", "peft")]
)
def test_missing_package(load: Load, monkeypatch: pytest.MonkeyPatch, contender: str, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else SimpleNamespace())
    found = measure(load, contender, "--workload", "w3")
    assert found["skipped"] == f"{package} is not installed"


@pytest.mark.parametrize("variant", ["fast", "compile+rows", "compile+fast"])
@pytest.mark.parametrize("contender", ["hf_trainer", "plain_loop"])
def test_unknown_option(load: Load, contender: str, variant: str) -> None:
    with pytest.raises(SystemExit, match="unknown option"):
        load(contender).main(["--workload", "w1", "--variant", variant])


def test_workload_needs_its_file(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("ours").main(["--workload", "w4"])
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "millions"), [("w1", 124), ("w2", 1236), ("w3", 8030), ("w4", 1236)])
def test_workloads_have_the_shapes_they_name(load: Load, name: str, millions: int) -> None:
    from transformers import AutoModelForCausalLM

    from truthgpt.models.architecture import load_architecture

    workload = load("workloads").WORKLOADS[name]
    data = ["data.path=pairs.jsonl"] if workload.needs_data else []
    for variant in ("default", "tuned"):
        config = load_config(str(workload.yaml), [*workload.ours(variant), *data])
        assert config.training.max_steps == 10_000, "long enough for every choice that depends on the length"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_architecture(None, config.model.config, False))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert not {key: value for key, value in config.model.config.items() if "drop" in key and value}


def test_adapters_of_the_workload(load: Load) -> None:
    lora = load_config(str(load("workloads").WORKLOADS["w3"].yaml), ()).model.lora
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout, lora.target_modules) == (True, 16, 32, 0.0, ["all-linear"])


def test_sweep_lists_are_valid(load: Load) -> None:
    for workload in load("workloads").WORKLOADS.values():
        for variant in (*workload.sweep, workload.hf_best):
            load("hf_trainer").parse_variant(variant)
        assert workload.hf_best in workload.sweep


def test_interleaving(load: Load) -> None:
    order: list[str] = []

    def run(side: str, timeout_s: float) -> Record:
        order.append(side)
        return {"tokens_per_s": {}, "wall_s": 0.0}

    runs, stopped = load("compare").interleave(run, 3, 60.0)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert stopped is None and [len(each) for each in runs.values()] == [3, 3]


def test_time_limit(load: Load) -> None:
    runs, stopped = load("compare").interleave(lambda side, left: {"tokens_per_s": {}, "wall_s": 100.0}, 3, 60.0)
    assert [len(each) for each in runs.values()] == [1, 1]
    assert stopped is not None and "peer takes 100 s" in stopped


def test_side_that_fails(load: Load) -> None:
    """The other one is measured once all the same."""

    def run(side: str, timeout_s: float) -> Record:
        failure = {"failed": "exit code 1", "said": "out of memory"}
        return {"wall_s": 1.0, **(failure if side == "ours" else {"tokens_per_s": {}})}

    runs, stopped = load("compare").interleave(run, 3, 60.0)
    assert [len(each) for each in runs.values()] == [1, 1]
    assert stopped == "ours: exit code 1: out of memory"


def test_best_is_what_the_sweep_found(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []

    def run(contender: str, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Record:
        commands.append([contender, *arguments])
        assert {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} == set(environment)
        return {"failed": "exit code 1", "said": "", "wall_s": 0.1}

    compare = load("compare")
    monkeypatch.setattr(compare, "run_contender", run)
    with pytest.raises(SystemExit):
        compare.main(["w2", "--ours", "tuned", "--peer", "hf_trainer:best", "--steps", "9", "--out", "r/a.jsonl"])
    best = load("workloads").WORKLOADS["w2"].hf_best
    assert commands == [
        ["ours", "--workload", "w2", "--variant", "tuned", "--steps", "9"],
        ["hf_trainer", "--workload", "w2", "--variant", best, "--steps", "9"],
    ]
    assert only_record("r/a.jsonl")["peer"] == f"hf_trainer:{best}"


def test_sweep(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(contender: str, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Record:
        variant = arguments[arguments.index("--variant") + 1]
        if variant == "compile":
            return {"failed": "exit code 1", "said": "no", "wall_s": 30.0}
        speed = {"default": 10.0, "regional": 20.0}[variant]
        return {
            **{"tokens_per_s": {"median": speed}, "memory": {"peak_allocated_bytes": 2**30}, "wall_s": 1.0},
            **{"arithmetic": {"share_of_matmul": 0.5}, "start": {"to_first_step_s": 3.0}},
            **{"hardware": {"name": "a GPU"}, "versions": {"torch": "2", "transformers": "5"}},
        }

    sweep = load("sweep")
    monkeypatch.setattr(sweep, "run_contender", run)
    variants = ("default", "regional", "compile", "liger")
    sweep.main(["w1", "--variants", *variants, "--minutes", "0.4", "--out", "results/sweep.jsonl"])
    said = capsys.readouterr()
    assert "--variants liger" in said.err, "after a variant of 30 s, 24 s are too little"
    load("table").main(["results"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| GPT-2")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["regional", "20"],
        ["default", "10"],
        ["compile", "exit code 1"],
    ]


def test_levels_add_up(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every level keeps the settings of those before it, and is a configuration that would run."""
    levels, workloads = load("levels"), load("workloads").WORKLOADS
    given: list[list[str]] = []

    def run(contender: str, arguments: list[str], environment: dict[str, str], timeout_s: float) -> dict[str, Any]:
        overrides = [each for each in arguments if "=" in each]
        given.append(overrides)
        data = ["data.path=x.jsonl"] if workloads[name].needs_data else []
        load_config(str(workloads[name].yaml), [*data, *overrides])
        speed = {"median": 1000.0 * len(given)}
        return {"tokens_per_s": speed, "arithmetic": {"share_of_matmul": 0.5}, "memory": None}

    monkeypatch.setattr(levels, "run_contender", run)
    for name in levels.LEVELS:
        given.clear()
        levels.main([name, "--out", "results/levels.jsonl"])
        assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(given))
    load("table").main(["results"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| w3")]
    assert [row.split(" | ")[2:4] for row in rows] == [["1,000", ""], ["2,000", "2.00"], ["3,000", "1.50"]]


def test_grid_of_memory(load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every point is a configuration that would run; a point that fails is in the table, and in no error."""
    memory, workloads = load("memory"), load("workloads").WORKLOADS

    def run(contender: str, arguments: list[str], environment: dict[str, str], timeout_s: float) -> dict[str, Any]:
        overrides = [each for each in arguments if "=" in each]
        config = load_config(str(workloads[arguments[1]].yaml), overrides)
        assert config.training.train_batch_size * config.data.max_seq_len == memory.TOKENS[arguments[1]]
        if config.model.memory.model_extra == {"checkpointed_layers": 6} and config.training.torch_compile:
            return {"failed": "exit code 7", "said": ""}
        return {"memory": {"peak_allocated_bytes": 4 * 2**30}}

    monkeypatch.setattr(memory, "run_contender", run)
    monkeypatch.setattr(memory, "predict", lambda workload, point: (5 if point["checkpointed"] else 4) * 2**30)
    memory.main(["--out", "results/memory.jsonl"])
    assert len(capsys.readouterr().out.splitlines()) == 36
    load("table").main(["results"])
    said = capsys.readouterr().out
    assert said.count("exit code 7") == 2 and "+25.0% |" in said
    assert "Errors: 25.0% in the middle, 25.0% at worst." in said


def test_process_that_fails(load: Load) -> None:
    found = load("processes").run_contender("ours", ["--workload", "none"], {}, 60.0)
    assert found["failed"] == "exit code 2" and "invalid choice" in found["said"]
    assert str(Path.home()) not in json.dumps(found)


def test_process_that_takes_too_long(load: Load) -> None:
    found = load("processes").run_contender("ours", ["--workload", "w1"], {}, 0.01)
    assert found["failed"] == "not done after 0 s" and found["wall_s"] < 10


def test_newest_record_counts(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of the records that the table is made of, with two calls of one comparison."""
    side = {
        **{"runs": 3, "tokens_per_s": {"median": 500e3, "lowest": 490e3, "highest": 510e3}, "step_ms": 65.0},
        **{"share_of_matmul": 0.5, "matmul_flops_per_s": 7.9e14, "peak_allocated_bytes": 15 * 2**30},
        **{"to_first_step_s": {"cold": 40.0, "warm": 20.0}, "to_last_step_s": {"cold": 50.0, "warm": 30.0}},
    }
    same = {"batches": True, "tokens_equal": True, "last_loss_difference": 2e-4}
    run = {"hardware": {"name": "a GPU"}, "versions": {"torch": "2.11.0", "transformers": "5.17.0"}}
    base = {"kind": "compare", "workload": "w1", "title": "GPT-2 124M, T=1024", "overrides": [], "stopped": None}
    base |= {"ours": "tuned", "peer": "hf_trainer:compile", "runs": {"ours": [run], "peer": [run]}}
    lines = []
    for ratio, day in ((1.4, 2), (1.2, 1)):
        summary = {"ours": side, "peer": side, "ratio": ratio, "ratios_of_pairs": [ratio, ratio + 0.1], "same": same}
        lines.append(json.dumps({**base, "created_at": f"2026-01-0{day}T00:00:00Z", "summary": summary}))
    Path("results").mkdir()
    Path("results/w1.jsonl").write_text("\n".join(lines))
    load("table").main(["results"])
    said = capsys.readouterr().out
    assert "a GPU, torch 2.11.0, transformers 5.17.0" in said
    assert said.splitlines()[-2] == (
        "| GPT-2 124M, T=1024 | tuned | hf_trainer:compile | 500,000 (490,000 to 510,000) | 500,000 (490,000 to "
        "510,000) | **1.40** (1.40 to 1.50) | 0.50 / 0.50 | 15.0 / 15.0 | 40 (20) / 40 (20) | equal | 2.0e-04 |"
    )


def test_collator_of_a_peer(load: Load) -> None:
    import numpy as np

    samples = [
        {"input_ids": np.arange(length), "labels": np.where(np.arange(length) < 1, -100, 5)} for length in (3, 5)
    ]
    collator = load("peer").PeerCollator(pad_token_id=9, masked=True)
    batch = collator(samples)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 9, 9], [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["shift_labels"] is batch["labels"]
    assert (collator.tokens, collator.positions, collator.samples) == ([6], [10], [2])


def test_state_of_the_gpu(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = load("processes")
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    assert processes.gpu_state() is None
    monkeypatch.setattr(processes.shutil, "which", lambda name: name)
    answer = SimpleNamespace(returncode=0, stdout="NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 40, 120.5 W, 700.00 W\n")
    monkeypatch.setattr(processes.subprocess, "run", lambda *arguments, **options: answer)
    assert processes.gpu_state()["clocks.sm"] == "1980 MHz"


def test_paged_kernel_over_its_grid(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The points, their share of the bandwidth and the records; the measurement itself needs a GPU."""
    script = load("paged_kernel")
    with pytest.raises(SystemExit, match="need a CUDA GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        script.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(script, "copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(script, "measure", lambda point: (point.kv_bytes / 2e12, 1))
    script.main(["--batches", "1", "64", "--contexts", "512", "--tiles", "64,4,3", "--json", "results/paged.jsonl"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all("50% of bandwidth" in line for line in printed[1:])
    records = [json.loads(line) for line in Path("results/paged.jsonl").read_text().splitlines()]
    assert [(record["batch"], record["kv_bytes"], record["tile"]) for record in records] == [
        (1, 2 * 512 * 8 * 64 * 2, [64, 4, 3]),
        (64, 2 * 64 * 512 * 8 * 64 * 2, [64, 4, 3]),
    ]
    assert all(record["kind"] == "paged_kernel" and "torch" in record["versions"] for record in records)


@needs_accelerate
@pytest.mark.soak
def test_in_processes_of_their_own(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--repeats", "2", "--steps", "8", "--out", "results/w1.jsonl")
    load("compare").main(["w1", "--peer", "hf_trainer:default", *options, *TINY_GPT2])
    record = only_record("results/w1.jsonl")
    assert record["summary"]["same"]["losses_equal"] and record["stopped"] is None
    assert record["summary"]["ours"]["to_first_step_s"]["warm"] > 0
    load("sweep").main(["w1", "--variants", "default", "--out", "results/s.jsonl", "--set", *TINY_GPT2])
    load("table").main(["results"])
    assert "## Sweep" in capsys.readouterr().out


def test_requests_of_generation_are_others_in_every_repeat(load: Load) -> None:
    script = load("generation")
    for name in script.LOADS:
        (first, new), (second, same) = (script.requests(name, repeat) for repeat in (1, 2))
        assert new == same and [len(p) for p in first] == [len(p) for p in second]
        assert not any(one == other for one, other in zip(first, second, strict=True))
    prompts, new = script.requests("context64", 0)
    assert len(prompts) == 64 and {len(prompt) for prompt in prompts} == {384} and set(new) == {256}
