"""A base held in NF4 (QLoRA): trained, resumed, evaluated, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.process import Cli
from tests.sample_data import write_sources
from tests.test_build import build
from tests.test_lora_run import (
    CPU,
    LORA,
    last_loss,
    needs_bf16,
    pretrained,
    run,
    train_straight_and_resumed,
    write_bases,
)
from truthgpt.errors import ConfigError
from truthgpt.load_model import load_model
from truthgpt.models.quantized_base import is_quantized
from truthgpt.models.trained_weights import adapter_weights

TARGET = {"llama": "v_proj", "gpt2": "c_proj"}
NF4 = ("model.lora.quantization=nf4",)
BF16 = pytest.param("bf16", marks=needs_bf16)


@pytest.fixture
def bases(cli: Cli) -> Cli:
    """Wide enough for blocks of 64."""
    write_sources(cli.folder)
    write_bases(cli.folder, width=64)
    return cli


def test_without_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bases(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"quantization: nf4 needs the package bitsandbytes.*'truthgpt\[qlora\]'"):
        build(tmp_path, *LORA, *pretrained(str(tmp_path / "llama")), *NF4)


def test_base_that_is_quantized_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bases(tmp_path)
    path = tmp_path / "llama/config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    for chosen in ((), LORA):
        with pytest.raises(ConfigError, match=r"model\.name_or_path: .*llama holds weights that are quantised already"):
            build(tmp_path, *chosen, *pretrained(str(tmp_path / "llama")))


class TestWithBitsandbytes:
    """Everything else needs the package."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("precision", ["none", BF16])
    @pytest.mark.parametrize(("name", "method"), [("llama", "lora"), ("gpt2", "dora")])
    def test_train_evaluate_generate(self, bases: Cli, name: str, method: str, precision: str) -> None:
        chosen = (
            *LORA,
            *pretrained(name),
            *NF4,
            f"training.mixed_precision={precision}",
            f"model.lora.method={method}",
        )
        run(bases, "train", "base.yaml", *chosen)
        evaluated = run(bases, "eval", "runs/t", "--json").json
        assert evaluated["metrics"]["loss"] == last_loss(bases.folder / "runs/t"), "the very figures of the run"
        assert run(bases, "eval", "runs/t/checkpoints/best.pt", "--json").json == evaluated
        run(bases, "generate", "runs/t", "--prompt", "the ", "--max-new-tokens", "4")
        plain = (*LORA, *pretrained(name), "output_dir=plain")
        run(bases, "train", "base.yaml", *plain)
        assert last_loss(bases.folder / "plain") != evaluated["metrics"]["loss"]

    @pytest.mark.parametrize("precision", ["none", BF16])
    def test_resume_is_exact(self, bases: Cli, precision: str) -> None:
        chosen = (*LORA, *pretrained("llama"), *NF4, f"training.mixed_precision={precision}", "model.lora.dropout=0.1")
        train_straight_and_resumed(bases, *chosen)

    @needs_bf16
    @pytest.mark.parametrize("weights", ["float32", "bf16_master"])
    def test_what_is_held_in_which_type(self, tmp_path: Path, weights: str) -> None:
        write_bases(tmp_path, width=64)
        chosen = (*LORA, *NF4, "training.mixed_precision=bf16", f"training.weights={weights}")
        components = build(tmp_path, *chosen, *pretrained(str(tmp_path / "llama")))
        model = components.model
        kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert kinds == {torch.uint8, torch.bfloat16}
        quantized = {name.rpartition(".")[2] for name, m in model.named_modules() if is_quantized(m)}
        assert quantized == {"base_layer"}, "the head stays as it is, and every quantised layer has an adapter"
        trained = torch.float32 if weights == "float32" else torch.bfloat16
        assert {p.dtype for p in adapter_weights(model).values()} == {trained}
        assert components.fallbacks.to_json() == []
        total = sum(p.numel() for p in build(tmp_path, *LORA, *pretrained(str(tmp_path / "llama"))).model.parameters())
        from truthgpt.models.causal_lm import count_parameters

        assert count_parameters(model)[0] == total

    @pytest.mark.parametrize("some", [False, True])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_merged_base_is_dequantized(self, bases: Cli, name: str, some: bool) -> None:
        targets = TARGET[name] if some else "all-linear"
        chosen = (*LORA, *pretrained(name), *NF4, "training.learning_rate=1e-2", "model.lora.method=dora")
        run(bases, "train", "base.yaml", *chosen, f"model.lora.target_modules=[{targets}]")
        check = run(bases, "export", "runs/t", "--out", "out", "--merge-lora", "--json").json["check"]
        assert check["dtype"] == "float32" and check["difference"] < 1e-5 < check["adapter_effect"]
        model = AutoModelForCausalLM.from_pretrained(bases.folder / "out", trust_remote_code=False)
        assert getattr(model.config, "quantization_config", None) is None
        ids = torch.tensor([list(b"the cat")])
        with torch.no_grad():
            ours = load_model(bases.folder / "runs/t", CPU).model(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, ours)

    def test_the_folder_says_what_its_base_was(self, bases: Cli) -> None:
        run(bases, "train", "base.yaml", *LORA, *pretrained("llama"), *NF4)
        described = json.loads((bases.folder / "runs/t/model/config.json").read_text())
        assert described["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
        assert any(is_quantized(module) for module in load_model(bases.folder / "runs/t", CPU).model.modules())

    @pytest.mark.parametrize("precision", ["none", BF16])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_exported_adapters_are_checked_on_the_base_as_it_was_quantized(
        self, bases: Cli, name: str, precision: str
    ) -> None:
        chosen = (*LORA, *pretrained(name), *NF4, f"training.mixed_precision={precision}")
        run(bases, "train", "base.yaml", *chosen)
        for target in ("runs/t", "runs/t/checkpoints/best.pt"):
            check = run(bases, "export", target, "--out", "out", "--overwrite", "--json").json["check"]
            assert check["difference"] < 1e-5
