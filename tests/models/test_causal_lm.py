"""Models: weights from the seed or from a folder, vocabulary, tied weights, and the loss."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from truthgpt.data.base import Batch
from truthgpt.errors import ConfigError
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import (
    build_causal_lm,
    causal_lm_loss,
    check_vocabulary,
    count_parameters,
    fit_vocabulary,
    load_causal_lm,
    set_generation_defaults,
)
from truthgpt.models.tokenizer import byte_tokenizer

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": 257,
}
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 257},
    "llama": TINY,
    "qwen3": TINY,
    "mistral": {**TINY, "sliding_window": None},
    "gemma3_text": {**TINY, "sliding_window": 32},
}
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, saved as transformers saves it."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**FAMILIES[request.param])).save_pretrained(path)
    return path


def from_folder(folder: Path, **overrides: object) -> PreTrainedModel:
    architecture = load_architecture(str(folder), overrides, trust_remote_code=False)
    return load_causal_lm(str(folder), architecture, "sdpa", trust_remote_code=False)


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project said; transformers' own report is quiet in a run."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("truthgpt")]


def batch_of(ids: torch.Tensor) -> Batch:
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}


def test_pretrained_weights_and_loss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "truthgpt"):
        model = from_folder(folder).eval()
    assert own_lines(caplog) == []
    reference = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, attn_implementation="eager"
    ).eval()
    for name, weight in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    batch = batch_of(IDS)
    batch["labels"][0, :4] = -100
    loss, logits = causal_lm_loss(model, batch)
    assert logits().shape == (2, 11, 257)
    expected = reference(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    picked = expected.gather(2, batch["labels"].clamp(min=0).unsqueeze(2)).squeeze(2)
    assert loss.item() == pytest.approx(-picked[batch["labels"] != -100].sum().item(), rel=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_weights_become_master_copies(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in from_folder(tmp_path).parameters()} == {torch.float32}


def test_right_padding_without_a_mask_changes_no_loss(folder: Path) -> None:
    model = from_folder(folder).eval()
    row = batch_of(IDS[:1])
    padded = {
        "input_ids": torch.nn.functional.pad(row["input_ids"], (0, 9), value=256),
        "labels": torch.nn.functional.pad(row["labels"], (0, 9), value=-100),
    }
    assert causal_lm_loss(model, padded)[0].item() == pytest.approx(causal_lm_loss(model, row)[0].item(), rel=1e-5)


def test_scratch_weights_depend_on_the_seed_only() -> None:
    architecture = load_architecture(None, {"model_type": "llama", **TINY}, trust_remote_code=False)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_causal_lm(architecture, "sdpa", seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours"
    torch.rand(5)
    second, other = build_causal_lm(architecture, "sdpa", seed=3), build_causal_lm(architecture, "sdpa", seed=4)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one(tied: bool) -> None:
    values = {"model_type": "llama", **TINY, "tie_word_embeddings": tied}
    model = build_causal_lm(load_architecture(None, values, trust_remote_code=False), "sdpa", seed=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    total, trainable = count_parameters(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    expected = sum(p.numel() for p in names.values()) - (257 * 16 if tied else 0)
    assert total == trainable == expected
    model.lm_head.weight.requires_grad_(False)
    assert count_parameters(model) == (expected, expected - 257 * 16)


def test_missing_weights_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_architecture(str(folder), {}, trust_remote_code=False)
    deeper = {"n_layer": 3} if config.model_type == "gpt2" else {"num_hidden_layers": 3}
    if config.model_type in ("qwen3", "gemma3_text"):  # they list the kind of every layer
        deeper["layer_types"] = None
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "truthgpt"):
        model = from_folder(folder, **deeper)
    (said,) = own_lines(caplog)
    assert "missing weights, for example" in said and ".2." in said
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = from_folder(folder, **deeper).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_unexpected_weights_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**FAMILIES["gpt2"])).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "truthgpt"):
        from_folder(tmp_path, n_layer=1)
    (said,) = own_lines(caplog)
    assert "11 unexpected weights, for example transformer.h.1." in said


def test_weights_that_do_not_fit_or_are_not_there(folder: Path, tmp_path: Path) -> None:
    width = {"n_embd": 8} if (folder / "config.json").read_text().count("n_embd") else {"hidden_size": 8}
    with pytest.raises(ConfigError, match="no weights can be loaded"):
        from_folder(folder, **width)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.init: scratch"):
        from_folder(tmp_path)


def test_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    architecture = load_architecture(None, {"model_type": "gpt2", **FAMILIES["gpt2"]}, trust_remote_code=False)
    fit_vocabulary(architecture, tokenizer, None)
    assert architecture.vocab_size == 257 and architecture.eos_token_id == 256
    fit_vocabulary(architecture, tokenizer, 320)
    assert architecture.vocab_size == 320
    with pytest.raises(ConfigError, match="256 token embeddings, the tokenizer 257 tokens"):
        fit_vocabulary(architecture, tokenizer, 256)
    check_vocabulary(257, 257)


def test_generation_stops_at_the_tokenizers_end() -> None:
    architecture = load_architecture(None, {"model_type": "llama", **TINY}, trust_remote_code=False)
    model = build_causal_lm(architecture, "sdpa", seed=0)
    set_generation_defaults(model, byte_tokenizer(), [])
    assert model.generation_config.eos_token_id == 256, "and not the 2 that Llama's configuration names"
    set_generation_defaults(model, byte_tokenizer(), [7, 256])
    assert model.generation_config.eos_token_id == [256, 7]
