"""`model/` of a run: there from the start, loadable by transformers, with the right weights and card at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from truthgpt.errors import RunDirectoryError
from truthgpt.models.causal_lm import set_generation_defaults
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.trainers.artefacts import ModelArtefacts, ModelCard, load_exported_weights


def artefacts(folder: Path, model: GPT2LMHeadModel, safetensors: bool = True) -> ModelArtefacts:
    tokenizer = byte_tokenizer()
    set_generation_defaults(model, tokenizer, [])
    return ModelArtefacts(folder, model, tokenizer, ModelCard("my-run", "text", "ppl", 7), safetensors)


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=257))


def test_description_comes_before_any_weight(tmp_path: Path, model: GPT2LMHeadModel) -> None:
    artefacts(tmp_path / "model", model).save_description()
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert config.architectures == ["GPT2LMHeadModel"] and config.n_embd == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)("a").input_ids == [97]
    assert not list((tmp_path / "model").glob("*.safetensors")) and not (tmp_path / "model/README.md").exists()


@pytest.mark.parametrize("safetensors", [True, False])
def test_weights_and_card(tmp_path: Path, model: GPT2LMHeadModel, safetensors: bool) -> None:
    artefacts(tmp_path, model, safetensors).save_weights({"step": 30, "best_metric": 2.5})
    name = "model.safetensors" if safetensors else "pytorch_model.bin"
    assert (tmp_path / name).is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    card = (tmp_path / "README.md").read_text()
    for fact in ("# my-run", "gpt2", "Data: text", "Step: 30", "ppl: 2.5", "Seed: 7"):
        assert fact in card


@pytest.mark.parametrize(("best", "line"), [(97.71468676101013, "30 (best ppl: 97.7147)"), (None, "30")])
def test_the_best_metric_in_the_card_is_for_people(
    tmp_path: Path, model: GPT2LMHeadModel, best: float | None, line: str
) -> None:
    """Where nothing was held out there is none."""
    artefacts(tmp_path, model, True).save_weights({"step": 30, "best_metric": best})
    assert f"- Step: {line}\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("safetensors", [True, False])
def test_weights_in_the_other_format_are_not_left_to_be_read(
    tmp_path: Path, model: GPT2LMHeadModel, safetensors: bool
) -> None:
    """A run is resumed to more steps, with another `training.save_safetensors`."""
    artefacts(tmp_path, model, not safetensors).save_weights({"step": 30, "best_metric": 2.5})
    with torch.no_grad():
        model.transformer.wte.weight += 1.0
    artefacts(tmp_path, model, safetensors).save_weights({"step": 60, "best_metric": 2.5})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.transformer.wte.weight, model.transformer.wte.weight)
    assert len([path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors")]) == 1


def test_average_replaces_the_weights_it_has(model: GPT2LMHeadModel) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    average = {"transformer.wte.weight": torch.full_like(model.transformer.wte.weight, 3.0)}
    load_exported_weights(model, {"model": state, "ema": average})
    assert (model.transformer.wte.weight == 3.0).all() and (model.lm_head.weight == 3.0).all()
    assert torch.equal(model.transformer.wpe.weight, state["transformer.wpe.weight"])
    load_exported_weights(model, {"model": state, "ema": {}})
    assert torch.equal(model.transformer.wte.weight, state["transformer.wte.weight"])


def test_a_description_that_cannot_be_written_leaves_the_old_one_whole(
    tmp_path: Path, model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer in it is what a resumed run reads; half of one would end every resume."""
    folder = tmp_path / "model"
    made = artefacts(folder, model)
    made.save_description()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fill_the_disk(self: object, place: Path, **_: object) -> None:
        (place / "tokenizer.json").write_text('{"version')
        raise Exception("No space left on device (os error 28)")  # as tokenizers does

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fill_the_disk)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        made.save_description()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_weights_that_cannot_be_written_are_said_as_the_disk_that_is_full(
    tmp_path: Path, model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", fill_the_disk)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        artefacts(tmp_path, model).save_weights({"step": 30, "best_metric": 2.5})
