"""Every export is loaded again and compared before it is called one; what differs leaves nothing behind."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import Unsupported
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import truthgpt.export_model
from tests.process import Cli
from tests.sample_data import write_every_source
from tests.test_added_tokens_run import CHAT, TOKENIZER, chats
from tests.test_lora_run import CPU, LORA, bases, pretrained, run
from truthgpt.errors import CheckpointError
from truthgpt.export_check import Expected, ExportCheck, check_written, expect
from truthgpt.export_model import export_model
from truthgpt.load_model import LoadedModel, load_model

__all__ = ["bases", "chats"]
FAST = (*LORA, "training.learning_rate=1e-2", "model.lora.dropout=0.0")
IMAGES = (
    *("model.task=image_classification", "data.source=image_folder", "data.path=images", "data.collate=cv"),
    *("model.tokenizer={}", "training.max_steps=4", "eval.metrics=[ppl]"),
)
VIT = (
    "model.config={model_type: vit, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, image_size: 8, "
    "intermediate_size: 8, patch_size: 4}"
)
RESNET = "model.config={model_type: resnet, embedding_size: 8, hidden_sizes: [8, 8], depths: [1, 1]}"


def train(cli: Cli, kind: str) -> None:
    """`runs/t`: a whole model, adapters on llama, adapters on a base that the run made, or an image classifier."""
    if kind in ("vit", "resnet"):
        write_every_source(cli.folder)
    chosen = {
        "model": ("training.max_steps=6",),
        "bin": ("training.max_steps=6", "training.save_safetensors=false"),
        "adapters": (*FAST, *pretrained("llama")),
        "own base": FAST,
        "vit": (*IMAGES, VIT),
        "resnet": (*IMAGES, RESNET),
    }
    run(cli, "train", "base.yaml", *chosen[kind])


@pytest.mark.parametrize("target", ["runs/t", "runs/t/checkpoints/best.pt"])
@pytest.mark.parametrize("kind", ["model", "bin", "adapters", "own base", "vit", "resnet"])
def test_every_export_is_checked(bases: Cli, kind: str, target: str) -> None:
    train(bases, kind)
    finished = run(bases, "export", target, "--out", "out", "--json")
    check = finished.json["check"]
    assert check == {"dtype": "float32", "difference": check["difference"], "tolerance": 1e-4, "adapter_effect": None}
    assert 0 <= check["difference"] < 1e-5 and "loading what was written" in finished.stderr
    said = run(bases, "export", target, "--out", "out", "--overwrite").stderr.splitlines()[-1]
    assert said.startswith("written in float32 and loaded again: its logits differ from those of the model by ")
    assert f"by {check['difference']:.2g} of their size (0.0001 is allowed)" in said


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = next(folder.glob("*.safetensors"))
        saved = load_file(path)
        name = max(saved, key=lambda name: (saved[name].dim(), name))
        save_file({**saved, name: change(saved[name])}, path, metadata={"format": "pt"})

    return damage


def cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-20])


def without_weights(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def other_classes(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "id2label": {"0": "one"}}))


def other_tokenizer(folder: Path) -> None:
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(described))


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


DIFFERS = r"what was exported does not compute what the model does: its logits differ by .* 0\.0001 is allowed"
UNREADABLE = "what was exported cannot be loaded again: "


@pytest.mark.parametrize("target", ["runs/t", "runs/t/checkpoints/best.pt"])
@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("model", change_weights(lambda w: w * 1.01), DIFFERS),
        ("model", change_weights(lambda w: w * torch.nan), DIFFERS),
        ("model", cut, UNREADABLE),
        ("model", without_weights, UNREADABLE),
        ("model", other_tokenizer, "the exported tokenizer does not encode texts as the model's own does"),
        ("model", without_tokenizer, UNREADABLE),
        ("adapters", change_weights(lambda w: w * 1.1), f"{DIFFERS}; peft puts the adapters on their base"),
        ("adapters", cut, UNREADABLE),
        ("vit", change_weights(lambda w: w * 1.1), DIFFERS),
        ("vit", other_classes, UNREADABLE),
    ],
)
def test_what_differs_is_no_export(
    bases: Cli,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: Callable[[Path], None],
    message: str,
    target: str,
) -> None:
    train(bases, kind)
    run(bases, "export", "llama", "--out", "there")
    before = {path.name: path.read_bytes() for path in (bases.folder / "there").iterdir()}

    def damaged(written: Path, expected: Expected) -> ExportCheck:
        damage(written)
        return check_written(written, expected)

    monkeypatch.setattr(truthgpt.export_model, "check_written", damaged)
    for out in ("out", "there"):
        with pytest.raises(CheckpointError, match=message):
            export_model(Path(target), Path(out), CPU, overwrite=True)
    assert {path.name: path.read_bytes() for path in (bases.folder / "there").iterdir()} == before
    assert not [path.name for path in bases.folder.iterdir() if "out" in path.name and "std" not in path.name]


def test_half_precision_folder_is_compared_as_it_is_stored(bases: Cli) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases.folder / "llama", trust_remote_code=False)
    model.half().save_pretrained(bases.folder / "llama")
    check = run(bases, "export", "llama", "--out", "out", "--json").json["check"]
    assert check["dtype"] == "fp16" and check["difference"] == 0.0


def test_averaged_and_raw_weights_are_those_of_the_checkpoint(bases: Cli) -> None:
    """Against transformers' model with the payload's tensors put in by hand."""
    run(bases, "train", "base.yaml", "training.max_steps=6", "training.learning_rate=1e-2")
    payload = torch.load(bases.folder / "runs/t/checkpoints/best.pt", weights_only=True)
    ids = torch.tensor([list(b"the cat ran under a dog")])
    found = {}
    for weights, state in (("ema", {**payload["model"], **payload["ema"]}), ("raw", payload["model"])):
        written = run(bases, "export", "runs/t", "--out", weights, "--weights", weights, "--json").json
        assert written["weights"] == weights and written["check"]["difference"] == 0.0
        model, reference = (
            AutoModelForCausalLM.from_pretrained(bases.folder / name, trust_remote_code=False)
            for name in (weights, "runs/t/model")
        )
        state.pop("lm_head.weight")  # tied to the embedding, which alone has an average
        reference.load_state_dict(state, strict=False)
        with torch.no_grad():
            found[weights] = model(input_ids=ids).logits
            assert torch.equal(found[weights], reference(input_ids=ids).logits)
    assert (found["ema"] - found["raw"]).abs().max() > 1e-3


def test_tokenizer_of_the_folder_encodes_equally(chats: Cli) -> None:
    run(chats, "train", "base.yaml", *FAST, *pretrained("llama"), *TOKENIZER, *CHAT)
    run(chats, "export", "runs/t", "--out", "out")
    run(chats, "export", "runs/t", "--out", "merged", "--merge-lora")
    own = AutoTokenizer.from_pretrained(chats.folder / "runs/t/model")
    text = "<|im_start|>user\nthe cat\u00e9 <|im_end|><|endoftext|>"
    for name in ("out", "merged"):
        written = AutoTokenizer.from_pretrained(chats.folder / name)
        assert written(text).input_ids == own(text).input_ids and {257, 258} <= set(written(text).input_ids)
        assert written.chat_template == own.chat_template is not None
        stops = GenerationConfig.from_pretrained(chats.folder / name).eos_token_id
        assert stops == own.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_adapters_on_a_base_with_other_settings(bases: Cli) -> None:
    """peft reads the base's own configuration, so that only a whole model can hold what was trained."""
    settings = "model.config={model_type: llama, rms_norm_eps: 0.5}"
    run(bases, "train", "base.yaml", *FAST, *pretrained("llama"), settings)
    refused = run(bases, "export", "runs/t", "--out", "out", exit_code=4).stderr
    assert "without the run's model.config: export with --merge-lora" in refused
    assert not (bases.folder / "out").exists()
    assert run(bases, "export", "runs/t", "--out", "out", "--merge-lora", "--json").json["check"]["difference"] < 1e-5


@pytest.mark.parametrize("kind", ["model", "adapters", "merged"])
def test_one_model_at_a_time(bases: Cli, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Behind this, which a run whose layers do not compile meets, a caller keeps what it gave to a call until it ends.
    with pytest.raises(Unsupported):
        torch.compile(torch._dynamo.graph_break, backend="eager", fullgraph=True)()
    train(bases, "model" if kind == "model" else "adapters")
    exported: list[weakref.ref[Any]] = []

    def remembered(*arguments: Any, **keywords: Any) -> LoadedModel:
        loaded = load_model(*arguments, **keywords)
        exported.append(weakref.ref(next(loaded.model.parameters())))
        return loaded

    def checked(written: Path, expected: Expected) -> ExportCheck:
        assert exported and exported[0]() is None, "still there while the other one is loaded"
        return check_written(written, expected)

    monkeypatch.setattr(truthgpt.export_model, "load_model", remembered)
    monkeypatch.setattr(truthgpt.export_model, "check_written", checked)
    export_model(Path("runs/t"), Path("out"), CPU, merge=kind == "merged")


def test_a_changed_model_is_seen_whatever_its_size(bases: Cli, caplog: pytest.LogCaptureFixture) -> None:
    """The tolerance lies between the order of sums and a change of one weight by a hundredth."""
    expected = expect(load_model(bases.folder / "llama", CPU))
    for factor, differs in ((1.0, False), (1 + 1e-7, False), (1.01, True)):
        shutil.copytree(bases.folder / "llama", bases.folder / "copy", dirs_exist_ok=True)
        change_weights(lambda w, factor=factor: w * factor)(bases.folder / "copy")  # type: ignore[misc]
        with caplog.at_level(logging.INFO, "truthgpt"):
            if differs:
                with pytest.raises(CheckpointError, match=DIFFERS):
                    check_written(bases.folder / "copy", expected)
            else:
                assert check_written(bases.folder / "copy", expected).difference < 1e-5
