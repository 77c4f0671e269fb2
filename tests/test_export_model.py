"""`truthgpt export`: what is written is what was trained, or nothing is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import truthgpt.export_model
from tests.process import Cli, Finished
from tests.sample_data import write_every_source
from tests.test_added_tokens_run import CHAT, TOKENIZER, chats
from tests.test_lora_run import CPU, LORA, bases, pretrained, run
from truthgpt.errors import CheckpointError, RunDirectoryError
from truthgpt.export_model import export_model
from truthgpt.load_model import load_model

__all__ = ["bases", "chats"]
IDS = torch.tensor([list(b"the cat ran under a dog")])
FAST = (*LORA, "training.learning_rate=1e-2", "model.lora.dropout=0.0")
"""Adapters that move the logits by more than rounding does."""


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(input_ids=ids).logits
    return found


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def refused(finished: Finished, *phrases: str) -> None:
    assert len(finished.stderr.strip().splitlines()[-1:]) == 1
    assert all(phrase in finished.stderr for phrase in phrases), finished.stderr


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".out") or path.name == "out"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_merged_computes_what_the_adapters_do(bases: Cli, name: str, method: str) -> None:
    run(bases, "train", "base.yaml", *FAST, *pretrained(name), f"model.lora.method={method}")
    finished = run(bases, "export", "runs/t", "--out", "deep/out", "--merge-lora", "--json")
    check = finished.json["check"]
    assert finished.json["kind"] == "merged" and check["dtype"] == "float32"
    assert check["difference"] < 1e-5 < check["tolerance"] == 1e-4 < check["adapter_effect"]
    assert "merging" in finished.stderr and "comparing" in finished.stderr
    out = bases.folder / "deep/out"
    torch.testing.assert_close(logits(plain(out)), logits(load_model(bases.folder / "runs/t", CPU).model))
    assert (logits(plain(out)) - logits(plain(bases.folder / name))).abs().max() > 1e-2
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any("adapter" in file for file in files) and "README.md" not in files
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == [97]
    tied = name == "gpt2"
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) != tied
    assert run(bases, "eval", str(out), "--config", "base.yaml", "--json").json["metrics"]["loss"] == pytest.approx(
        run(bases, "eval", "runs/t", "--json").json["metrics"]["loss"], rel=1e-5
    )


def test_adapters_as_they_are(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"))
    written = run(bases, "export", "runs/t", "--out", "out", "--json").json
    check = written.pop("check")
    assert written == {"folder": "out", "kind": "adapters", "weights": "ema"}
    assert check["difference"] < 1e-5 < check["tolerance"] == 1e-4 and check["adapter_effect"] is None
    own, out = bases.folder / "runs/t/model", bases.folder / "out"
    assert {p.name: p.read_bytes() for p in own.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_checkpoints_with_and_without_their_average(bases: Cli) -> None:
    for name, chosen in (("adapters", (*FAST, *pretrained("llama"))), ("whole", ("training.max_steps=6",))):
        run(bases, "train", "base.yaml", *chosen, f"output_dir={name}")
        best = f"{name}/checkpoints/best.pt"
        assert run(bases, "export", best, "--out", f"{name}-ema", "--json").json["weights"] == "ema"
        run(bases, "export", name, "--out", f"{name}-run")
        run(bases, "export", name, "--out", f"{name}-raw", "--weights", "raw")
        load = AutoPeftModelForCausalLM if name == "adapters" else AutoModelForCausalLM
        ema, final, raw = (
            logits(load.from_pretrained(bases.folder / f"{name}-{kind}", trust_remote_code=False))
            for kind in ("ema", "run", "raw")
        )
        assert torch.equal(ema, final) and not torch.equal(ema, raw)
        payload = torch.load(bases.folder / best, weights_only=True)
        file = "adapter_model.safetensors" if name == "adapters" else "model.safetensors"
        saved = load_file(bases.folder / f"{name}-raw" / file)
        for key, value in saved.items():
            assert torch.equal(value, payload["model"][key.removeprefix("base_model.model.")]), key
        for kind in ("ema", "raw"):
            own, out = bases.folder / name / "model", bases.folder / f"{name}-{kind}"
            assert (out / "generation_config.json").read_bytes() == (own / "generation_config.json").read_bytes()
    run(bases, "export", "adapters", "--out", "merged-raw", "--merge-lora", "--weights", "raw")
    raw = AutoPeftModelForCausalLM.from_pretrained(bases.folder / "adapters-raw", trust_remote_code=False)
    torch.testing.assert_close(logits(plain(bases.folder / "merged-raw")), logits(raw))
    refused(run(bases, "export", "llama", "--out", "o", "--weights", "raw", exit_code=2), "llama has no checkpoints")


def test_base_that_the_run_made_travels_with_its_adapters(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *FAST)
    expected = logits(load_model(bases.folder / "runs/t", CPU).model)
    run(bases, "export", "runs/t", "--out", "out")
    run(bases, "export", "runs/t/checkpoints/best.pt", "--out", "checkpoint")
    run(bases, "export", "runs/t", "--out", "merged", "--merge-lora")
    (bases.folder / "runs/t").rename(bases.folder / "moved")
    for name in ("out", "checkpoint"):
        theirs = AutoPeftModelForCausalLM.from_pretrained(bases.folder / name, trust_remote_code=False)
        assert theirs.peft_config["default"].base_model_name_or_path == str(bases.folder / name / "base")
        torch.testing.assert_close(logits(theirs), expected)
    torch.testing.assert_close(logits(plain(bases.folder / "merged")), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_new_tokens_are_merged(chats: Cli, name: str) -> None:
    run(chats, "train", "base.yaml", *FAST, *pretrained(name), *TOKENIZER, *CHAT)
    run(chats, "export", "runs/t", "--out", "out", "--merge-lora")
    model = plain(chats.folder / "out")
    assert model.config.vocab_size == 259 == model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[257, *b"user\nthe cat", 258]])
    torch.testing.assert_close(logits(model, ids), logits(load_model(chats.folder / "runs/t", CPU).model, ids))
    assert AutoTokenizer.from_pretrained(chats.folder / "out").convert_tokens_to_ids("<|im_end|>") == 258


def in_bf16(folder: Path) -> None:
    plain(folder).bfloat16().save_pretrained(folder)


def test_bf16_base_stays_bf16(bases: Cli) -> None:
    in_bf16(bases.folder / "llama")
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"))
    check = run(bases, "export", "runs/t", "--out", "out", "--merge-lora", "--json").json["check"]
    assert check["dtype"] == "bf16" and check["tolerance"] == 4 * 2**-7
    assert 1e-4 < check["difference"] < 0.01 < check["adapter_effect"]
    saved = load_file(bases.folder / "out/model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    wide = run(bases, "export", "runs/t", "--out", "wide", "--merge-lora", "--dtype", "float32", "--json").json["check"]
    assert wide["dtype"] == "float32" and wide["difference"] < 1e-5
    assert {value.dtype for value in load_file(bases.folder / "wide/model.safetensors").values()} == {torch.float32}


def test_adapters_that_rounding_would_swallow(bases: Cli) -> None:
    in_bf16(bases.folder / "llama")
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"), "training.learning_rate=1e-6")
    finished = run(bases, "export", "runs/t", "--out", "out", "--merge-lora", exit_code=4)
    refused(finished, "bf16 rounds away what the adapters learned", "--dtype float32")
    assert left_behind(bases.folder) == []
    run(bases, "export", "runs/t", "--out", "out", "--merge-lora", "--dtype", "float32")


def change_a_file(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    saved = load_file(path)
    name = next(name for name in saved if "up_proj" in name)
    save_file({**saved, name: change(saved[name])}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [lambda w: w * 1.1, lambda w: w * torch.nan], ids=["other", "nan"])
def test_a_merge_that_computes_something_else(
    bases: Cli, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"))
    original = truthgpt.export_model._copy_description

    def damage(folder: Path, written: Path, **keywords: Any) -> None:
        original(folder, written, **keywords)
        change_a_file(written, change)

    monkeypatch.setattr(truthgpt.export_model, "_copy_description", damage)
    with pytest.raises(CheckpointError, match="does not compute what base and adapters do"):
        export_model(Path("runs/t"), Path("out"), CPU, merge=True)
    assert left_behind(bases.folder) == []


def test_what_is_there_is_not_overwritten(bases: Cli) -> None:
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"))
    run(bases, "export", "runs/t", "--out", "out")
    before = (bases.folder / "out/adapter_model.safetensors").read_bytes()
    again = ("export", "runs/t", "--out", "out", "--merge-lora")
    refused(run(bases, *again, exit_code=6), "out is there already", "--overwrite")
    assert (bases.folder / "out/adapter_model.safetensors").read_bytes() == before
    run(bases, *again, "--overwrite")
    assert not (bases.folder / "out/adapter_model.safetensors").exists() and left_behind(bases.folder) == ["out"]
    (bases.folder / "letters").mkdir()
    (bases.folder / "letters/dear.txt").write_text("x")
    letters = run(bases, "export", "runs/t", "--out", "letters", "--overwrite", exit_code=6)
    refused(letters, "letters is no model folder")
    for out in ("runs/t/model", "runs", "runs/t/model/inner"):
        finished = run(bases, "export", "runs/t", "--out", out, "--overwrite", exit_code=6)
        refused(finished, "lie in one another")
    (bases.folder / "empty").mkdir()
    run(bases, "export", "runs/t", "--out", "empty")


def test_a_failure_leaves_what_was_there(bases: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"))
    run(bases, "export", "runs/t", "--out", "out")
    before = {path.name: path.read_bytes() for path in (bases.folder / "out").iterdir()}

    told_of_a_file = "[Errno 28] No space left on device: 'a' -> 'b'"
    for writer, error, merge in (
        ("shutil.copytree", shutil.Error([("a", "b", told_of_a_file), ("c", "d", told_of_a_file)]), False),
        (
            "transformers.PreTrainedModel.save_pretrained",
            SafetensorError("I/O error: No space left on device (os error 28)"),
            True,
        ),
    ):

        def full(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(writer, full)
            with pytest.raises(RunDirectoryError, match=r"out cannot be written: \[Errno 28\] No space left"):
                export_model(Path("runs/t"), Path("out"), CPU, overwrite=True, merge=merge)
    assert {path.name: path.read_bytes() for path in (bases.folder / "out").iterdir()} == before
    assert left_behind(bases.folder) == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "phrase"),
    [
        (("llama", "--out", "out", "--merge-lora"), 2, "--merge-lora: llama has no adapters"),
        (("llama", "--out", "out", "--dtype", "bf16"), 2, "--dtype is read with --merge-lora only"),
        (("nowhere", "--out", "out"), 4, "nothing to load at nowhere"),
        (("llama", "--out", "base.yaml/x"), 6, "base.yaml/x cannot be written"),
    ],
)
def test_wrong_commands(bases: Cli, arguments: tuple[str, ...], code: int, phrase: str) -> None:
    refused(run(bases, "export", *arguments, exit_code=code), phrase)
    assert left_behind(bases.folder) == []


def test_image_classifier(cli: Cli) -> None:
    write_every_source(cli.folder)
    images = (
        *("model.task=image_classification", "data.source=image_folder", "data.path=images", "data.collate=cv"),
        *("model.tokenizer={}", "training.max_steps=4", "eval.metrics=[ppl]"),
        "model.config={model_type: vit, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, image_size: 8, "
        "intermediate_size: 8, patch_size: 4}",
    )
    run(cli, "train", "base.yaml", *images)
    run(cli, "export", "runs/t/checkpoints/best.pt", "--out", "out")
    own, written = (
        AutoModelForImageClassification.from_pretrained(cli.folder / name, trust_remote_code=False)
        for name in ("runs/t/model", "out")
    )
    assert all(torch.equal(value, written.state_dict()[name]) for name, value in own.state_dict().items())
    assert json.loads((cli.folder / "out/preprocessor_config.json").read_text())
