"""`truthgpt plan`: what it prints, its JSON, and what it says of runs that do not fit."""

from __future__ import annotations

import json

import pytest
from tests.process import Cli

BIG = """\
model:
  init: scratch
  tokenizer: {type: byte}
  config: {model_type: llama, vocab_size: 128256, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32,
    num_attention_heads: 32, num_key_value_heads: 8, max_position_embeddings: 8192}
training: {max_steps: 100, train_batch_size: 2, grad_accum_steps: 4, mixed_precision: bf16, torch_compile: false}
data: {source: text, path: nowhere.txt, max_seq_len: 4096}
"""
FITS = ("training.weights=bf16_stochastic", "ema.enabled=false")


@pytest.fixture
def big(cli: Cli) -> Cli:
    """The `cli` with `big.yaml`: eight billion weights, and data that is not there."""
    (cli.folder / "big.yaml").write_text(BIG)
    return cli


def test_a_run_that_fits(big: Cli) -> None:
    finished = big("plan", "big.yaml", *FITS, "--gpu-memory", "141GB", "--gpu", "H200")
    assert finished.exit_code == 0, finished.stderr
    said = finished.stdout
    assert "H200 with 131 GiB; bf16, eager" in said and "8,030,261,248" in said
    assert "layers computed again" in said and "does not fit" in said, "without checkpointing it would not"
    assert "weights" in said and "14.96" in said, "two bytes each"


def test_json(big: Cli) -> None:
    finished = big("plan", "big.yaml", *FITS, "--gpu-memory", "141GB", "--json")
    assert finished.exit_code == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["fits"] and found["problem"] is None and found["parameters"] == 8_030_261_248
    assert found["micro_batch_size"] * found["grad_accum_steps"] == 8 and found["tokens_per_step"] == 8 * 4096
    assert sum(found["memory_bytes"].values()) == found["peak_bytes"] <= found["limit_bytes"]
    assert found["run_time_s"] == pytest.approx(100 * found["step_time_s"]) and found["step_time_s"] > 1
    assert [each["checkpointed_layers"] for each in found["checkpointing"]] == [0, 16, 32]


def test_a_run_that_does_not_fit(big: Cli) -> None:
    finished = big("plan", "big.yaml", "--gpu-memory", "80GiB")
    assert finished.exit_code == 7
    assert "the smallest takes" in finished.stderr and "model.lora.enabled=true" in finished.stderr
    static = big("plan", "big.yaml", "model.memory.policy=static", "--gpu-memory", "80GiB", "--json")
    assert static.exit_code == 7 and json.loads(static.stdout)["fits"] is False
    assert "model.memory.policy=adaptive" in static.stderr


MIXTURE = """\
model:
  init: scratch
  tokenizer: {type: byte}
  config: {model_type: mixtral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, num_local_experts: 4}
  lora: {enabled: true, dropout: 0.0}
training: {max_steps: 100, mixed_precision: none}
data: {source: text, path: nowhere.txt, max_seq_len: 64}
"""


def test_a_model_that_cannot_be_counted_is_one_line(cli: Cli) -> None:
    (cli.folder / "mixture.yaml").write_text(MIXTURE)
    finished = cli("plan", "mixture.yaml", "--gpu-memory", "80GiB")
    if finished.exit_code == 0:
        pytest.skip("this torch can count it")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: a step of this model cannot be counted without running it: ")


def test_this_machine(cli: Cli) -> None:
    finished = cli("plan", "hardware.device=cpu")
    assert finished.exit_code == 0, finished.stderr
    assert "cpu; fp32, eager" in finished.stdout and " MiB of " in finished.stdout, "a model of a few megabytes"
    assert (
        "time: the speed of cpu in fp32 is not known; --gpu-memory 80GiB --gpu NAME plans for one of" in finished.stderr
    )


def test_a_gpu_of_unknown_speed_is_told_the_known_ones(big: Cli) -> None:
    finished = big("plan", "big.yaml", *FITS, "--gpu-memory", "141GB", "--gpu", "Z9")
    assert finished.exit_code == 0 and "peak" in finished.stdout
    assert "the speed of Z9 with 131 GiB in bf16 is not known" in finished.stderr and ", H200, " in finished.stderr


def test_a_gpu_needs_its_memory(cli: Cli) -> None:
    finished = cli("plan", "--gpu", "H200")
    assert finished.exit_code == 2 and "--gpu H200 --gpu-memory 80GiB" in finished.stderr


@pytest.mark.parametrize("size", ["many", "0GiB", "12XB", "-3GB"])
def test_no_size(cli: Cli, size: str) -> None:
    finished = cli("plan", f"--gpu-memory={size}")
    assert finished.exit_code == 2 and "80GiB" in finished.stderr


def test_images_and_mistakes(big: Cli) -> None:
    finished = big("plan", "big.yaml", "model.task=image_classification", "data.source=image_folder", "data.path=x")
    assert finished.exit_code == 2 and "Traceback" not in finished.stderr
    finished = big("plan", "big.yaml", "training.train_batch_sice=3")
    assert finished.exit_code == 2 and "train_batch_size" in finished.stderr
