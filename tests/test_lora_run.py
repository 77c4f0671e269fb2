"""Adapters from the YAML to `generate`: training, exact resume, evaluation, peft's own loading, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import truthgpt.build_memory
import truthgpt.build_text
from tests.process import Cli, Finished
from tests.sample_data import write_sources
from tests.test_build import build, build_small_trainer, small_config
from tests.test_resume import assert_same_run, final_checkpoint
from truthgpt.build import build_evaluation
from truthgpt.errors import ConfigError
from truthgpt.load_model import load_model
from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.models.trained_weights import BASE_DIGEST, adapter_weights
from truthgpt.runtime.precision import has_native_bf16

CPU = torch.device("cpu")
LORA = ("model.lora.enabled=true", "training.max_steps=12", "training.eval_interval=6", "checkpoint.interval_steps=5")
needs_bf16 = pytest.mark.skipif(not has_native_bf16(CPU), reason="this processor computes bf16 in float32")


def write_bases(folder: Path, width: int = 32) -> None:
    """`gpt2` (Conv1D, tied, dropout) and `llama`, as transformers saves them."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=width, n_positions=64, vocab_size=257)).save_pretrained(
        folder / "gpt2"
    )
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=257, max_position_embeddings=64)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("gpt2", "llama"):
        byte_tokenizer().save_pretrained(folder / name)


def pretrained(name: str) -> tuple[str, ...]:
    return (f"model.name_or_path={name}", "model.init=auto", "model.config={}", "model.tokenizer={}")


@pytest.fixture
def bases(cli: Cli) -> Cli:
    """The `cli` in a folder with data, `base.yaml` and two pretrained models."""
    write_sources(cli.folder)
    write_bases(cli.folder)
    return cli


def run(cli: Cli, *arguments: str, exit_code: int = 0) -> Finished:
    finished = cli(*arguments)
    assert finished.exit_code == exit_code, finished.stderr
    return finished


def last_loss(folder: Path) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float([row["val_loss"] for row in rows if "val_loss" in row][-1])


@pytest.mark.parametrize("precision", ["none", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize(
    ("name", "method", "dropout"),
    [("gpt2", "lora", 0.05), ("llama", "lora", 0.0), ("gpt2", "dora", 0.0), ("llama", "dora", 0.05)],
)
def test_train_evaluate_generate(bases: Cli, name: str, method: str, dropout: float, precision: str) -> None:
    chosen = (*LORA, *pretrained(name), f"model.lora.dropout={dropout}", f"training.mixed_precision={precision}")
    chosen = (*chosen, f"model.lora.method={method}")
    said = run(bases, "train", "base.yaml", *chosen).stderr
    assert "trained)" in said and "complete: 12 steps" in said
    folder = bases.folder / "runs/t"
    evaluated = run(bases, "eval", "runs/t", "--json").json
    assert evaluated["metrics"]["loss"] == last_loss(folder), "the very figures of the run"
    (written,) = run(bases, "generate", "runs/t", "--prompt", "the ", "--max-new-tokens", "4", "--json").json
    assert len(written["token_ids"]) == 4
    from_checkpoint = run(bases, "eval", "runs/t/checkpoints/best.pt", "--json").json
    assert from_checkpoint == evaluated
    files = {path.name for path in (folder / "model").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "generation_config.json"} <= files
    assert not {"model.safetensors", "base"} & files
    card = (folder / "model/README.md").read_text()
    assert "PeftModel.from_pretrained" in card and str(bases.folder / name) in card and "Step: 12" in card


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_loads_the_model(bases: Cli, name: str, method: str) -> None:
    run(bases, "train", "base.yaml", *LORA, *pretrained(name), f"model.lora.method={method}")
    folder = bases.folder / "runs/t/model"
    base = AutoModelForCausalLM.from_pretrained(bases.folder / name, trust_remote_code=False)
    ids = torch.tensor([list(b"the cat ran under a dog")])
    with torch.no_grad():
        without = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, folder, trust_remote_code=False).eval()(input_ids=ids).logits
        by_name = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()(input_ids=ids).logits
        ours = load_model(folder, CPU).model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(by_name, ours)
    assert (without - ours).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["none", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize(("name", "method"), [("gpt2", "lora"), ("llama", "lora"), ("gpt2", "dora"), ("llama", "dora")])
def test_resume_is_exact(bases: Cli, name: str, method: str, precision: str) -> None:
    """With dropout in the adapters and an average of them."""
    chosen = (*LORA, *pretrained(name), "model.lora.dropout=0.1", f"training.mixed_precision={precision}")
    train_straight_and_resumed(bases, *chosen, f"model.lora.method={method}")


def train_straight_and_resumed(bases: Cli, *chosen: str) -> None:
    """Twelve steps at once and from the checkpoint of step 5, the same bit for bit; for the whole run `straight`."""
    chosen = (*chosen, "checkpoint.keep_last=9")
    run(bases, "train", "base.yaml", *chosen, "output_dir=straight")
    run(bases, "train", "base.yaml", *chosen, "output_dir=cut")
    for path in (bases.folder / "cut/checkpoints").glob("*"):
        if path.stem != "step_00000005":
            path.unlink()
    (bases.folder / "cut/status.json").unlink()
    said = run(bases, "train", "base.yaml", *chosen, "output_dir=cut", "--resume", "auto").stderr
    assert "step  6/12" in said and "step  5/12" not in said
    assert_same_run(bases.folder / "straight", bases.folder / "cut", 12)


def test_checkpoints_hold_the_adapters_alone(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *LORA, *pretrained("llama"), "model.lora.r=2")
    payload = final_checkpoint(bases.folder / "runs/t", 12)
    adapters = {name for name in payload["model"] if name != BASE_DIGEST}
    assert len(adapters) == 2 * 2 * 7 and all(".lora_A." in name or ".lora_B." in name for name in adapters)
    assert payload["ema"].keys() == adapters
    assert len(payload["optimizer"]["state"]) == len(adapters)
    assert not any(torch.equal(payload["ema"][name], payload["model"][name]) for name in adapters)


def change_a_weight(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    next(model.parameters()).data[0, 0] += 1.0
    model.save_pretrained(folder)


def test_resume_on_another_base_is_refused(bases: Cli) -> None:
    chosen = (*LORA, *pretrained("llama"))
    run(bases, "train", "base.yaml", *chosen)
    change_a_weight(bases.folder / "llama")
    again = run(bases, "train", "base.yaml", *chosen, "training.max_steps=14", "--resume", "auto", exit_code=4)
    assert "trained on a base model with other weights" in again.stderr and "name_or_path" in again.stderr
    best = run(bases, "eval", "runs/t/checkpoints/best.pt", exit_code=4)
    assert "trained on a base model with other weights" in best.stderr


def test_resume_without_or_with_other_adapters_is_refused(bases: Cli) -> None:
    chosen = (*LORA, *pretrained("llama"))
    run(bases, "train", "base.yaml", *chosen)
    for change, key in (("model.lora.enabled=false", "model.lora.enabled"), ("model.lora.r=4", "model.lora.r")):
        again = run(
            bases, "train", "base.yaml", *chosen, change, "--resume", "auto", "training.max_steps=14", exit_code=2
        )
        assert key in again.stderr and "changed since the run started" in again.stderr
    (bases.folder / "runs/t/config.yaml").unlink()  # now only the checkpoint itself can tell
    step = str(bases.folder / "runs/t/checkpoints/last.pt")
    whole = run(*(bases, "train", "base.yaml", *pretrained("llama"), "output_dir=whole", "--resume", step), exit_code=4)
    assert "the checkpoint is of another model" in whole.stderr


@pytest.mark.parametrize("as_safetensors", ["true", "false"])
def test_base_from_scratch_is_saved_too(bases: Cli, as_safetensors: str, tmp_path: Path) -> None:
    run(bases, "train", "base.yaml", *LORA, f"training.save_safetensors={as_safetensors}")
    folder = bases.folder / "runs/t"
    assert (
        folder / "model/base" / ("model.safetensors" if as_safetensors == "true" else "pytorch_model.bin")
    ).is_file()
    evaluated = run(bases, "eval", "runs/t", "--json").json
    assert evaluated["metrics"]["loss"] == last_loss(folder)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False).eval()
    ids = torch.tensor([list(b"the cat")])
    torch.testing.assert_close(theirs(input_ids=ids).logits, load_model(folder, CPU).model(input_ids=ids).logits)
    folder.rename(bases.folder / "moved")
    assert run(bases, "eval", "moved", "--json").json == evaluated


def test_unfinished_run_is_used_from_its_checkpoint(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *LORA, *pretrained("gpt2"))
    folder = bases.folder / "runs/t"
    evaluated = run(bases, "eval", "runs/t", "--json").json
    (folder / "model/adapter_model.safetensors").unlink()
    unfinished = run(bases, "eval", "runs/t", "--json")
    assert unfinished.json == evaluated and "has no final weights yet" in unfinished.stderr


def test_base_that_is_not_there(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *LORA, *pretrained("gpt2"))
    run(bases, "train", "base.yaml", *LORA, "output_dir=scratch")
    shutil.move(bases.folder / "gpt2", bases.folder / "gone")
    shutil.rmtree(bases.folder / "scratch/model/base")
    finished = run(bases, "eval", "runs/t", exit_code=4)
    assert "the base of the adapters in runs/t/model cannot be loaded" in finished.stderr
    assert str(bases.folder / "gpt2") in finished.stderr
    finished = run(bases, "eval", "scratch/checkpoints/last.pt", exit_code=4)
    assert "saves it with its final model" in finished.stderr


def test_unknown_layer(bases: Cli) -> None:
    finished = run(bases, "train", "base.yaml", *LORA, "model.lora.target_modules=[q_proj, c_attn]", exit_code=2)
    assert "no linear layer of GPT2LMHeadModel is called 'q_proj'; there are: c_attn, c_fc, c_proj" in finished.stderr
    assert not (bases.folder / "runs/t/config.yaml").exists()


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is loaded."""
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(truthgpt.build_text, "load_architecture", lambda *_: pytest.fail("the model was looked at"))
    with pytest.raises(ConfigError, match=r"pip install 'truthgpt\[lora\]'") as caught:
        build(tmp_path, *LORA)
    assert caught.value.exit_code == 2


def test_adapters_without_peft_to_load_them(bases: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bases, "train", "base.yaml", *LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install"):
        load_model(bases.folder / "runs/t", CPU)


def test_evaluation_computes_as_training_did(tmp_path: Path) -> None:
    write_bases(tmp_path)
    chosen = (*LORA, *pretrained(str(tmp_path / "llama")), "model.lora.dropout=0.0")
    build_small_trainer(tmp_path, *chosen).train()
    loaded = load_model(tmp_path / "runs/t", CPU)
    build_evaluation(small_config(tmp_path, *chosen), loaded)
    assert shared_layers(loaded.model) == 2 * 5


def shared_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, AdaptedLinear) and module._shared is not None for module in model.modules())


@needs_bf16
@pytest.mark.parametrize("scratch", [True, False])
def test_frozen_weights_never_exist_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: bool) -> None:
    """They are made or read in bf16; adapters stay float32, and nothing computes under autocast."""
    write_bases(tmp_path)
    made: list[set[torch.dtype]] = []
    for name in ("build_causal_lm", "load_causal_lm"):
        original = getattr(truthgpt.build_text, name)

        def noting(*arguments: Any, original: Any = original) -> Any:
            model = original(*arguments)
            made.append({parameter.dtype for parameter in model.parameters()})
            return model

        monkeypatch.setattr(truthgpt.build_text, name, noting)
    source = () if scratch else pretrained(str(tmp_path / "llama"))
    components = build(tmp_path, *LORA, *source, "training.mixed_precision=bf16")
    assert made == [{torch.bfloat16}]
    frozen, trained = set(), set()
    for parameter in components.model.parameters():
        (trained if parameter.requires_grad else frozen).add(parameter.dtype)
    assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
    assert components.precision.name == "bf16"
    with components.precision.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert components.fallbacks.to_json() == []


@needs_bf16
def test_adapters_in_bf16_with_a_master_copy(tmp_path: Path) -> None:
    trainer = build_small_trainer(tmp_path, *LORA, "training.mixed_precision=bf16", "training.weights=bf16_master")
    assert {p.dtype for p in trainer.parts.engine.model.parameters()} == {torch.bfloat16}
    trainer.train()
    assert all("master" in state for state in trainer.parts.engine.optimizer.state.values())


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_compiled_as_whole_layers(tmp_path: Path, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # what other tests compiled of the same layers counts towards its limit
    write_bases(tmp_path)
    compile_module = torch.nn.Module.compile
    asked = []

    def compile_quickly(self: torch.nn.Module, *, mode: str, **keywords: Any) -> None:
        asked.append(keywords["fullgraph"])
        compile_module(self, backend="aot_eager", **keywords)

    monkeypatch.setattr(truthgpt.build_memory, "measure_activations", not_measured)  # it compiles too

    losses = []
    for compiled in ("false", "true"):
        monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
        chosen = (f"model.gradient_checkpointing={checkpointing}", f"training.torch_compile={compiled}")
        trainer = build_small_trainer(
            *(tmp_path, *LORA, *pretrained(str(tmp_path / "llama")), *chosen, "model.lora.dropout=0.0"),
            f"output_dir={tmp_path / compiled}",
        )
        trainer.train()
        losses.append(last_loss(tmp_path / compiled))
    assert asked == [True, True] and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert shared_layers(trainer.parts.engine.model) == (0 if checkpointing == "true" else 2 * 5)
    torch._dynamo.reset()


def not_measured(*arguments: Any, **keywords: Any) -> None:
    raise NotImplementedError("not measured here")


def test_adapter_that_the_model_does_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_small_trainer(tmp_path, *LORA)
    layer = next(m for m in trainer.parts.engine.model.modules() if isinstance(m, AdaptedLinear))
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)
    with pytest.raises(ConfigError, match=r"no gradient reaches the adapter of transformer\.h\.0\.attn\.c_attn"):
        trainer.train()
    assert not list((tmp_path / "runs/t/checkpoints").glob("*.pt"))


def test_a_folder_of_adapters_is_no_base(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *LORA, *pretrained("gpt2"))
    finished = run(bases, "train", "base.yaml", *LORA, *pretrained("runs/t/model"), "output_dir=second", exit_code=2)
    assert "adapters" in finished.stderr


def test_seed_of_the_adapters(tmp_path: Path) -> None:
    write_bases(tmp_path)
    source = pretrained(str(tmp_path / "gpt2"))
    first, again, other = (adapter_weights(build(tmp_path, *LORA, *source, f"seed={seed}").model) for seed in (7, 7, 8))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
