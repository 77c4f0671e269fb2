"""Adapters: where they go and how they begin, what is saved, what peft makes of that, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from tests.attention.packed_models import COMMON, model_of
from tests.models.adapted_models import IDS, METHODS, SHAPES, adapted, peft_config, peft_name, settings
from torch import nn
from transformers import PreTrainedModel

from truthgpt.errors import CheckpointError, ConfigError
from truthgpt.models.adapted_linear import AdaptedLinear
from truthgpt.models.lora import Method, add_adapters, load_adapters, require_peft, save_adapter_config, save_adapters
from truthgpt.models.trained_weights import adapter_weights
from truthgpt.runtime.precision import hold_frozen_in_bf16
from truthgpt.runtime.seeds import derive_seed

LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SHAPES)
def test_begins_as_peft_begins_and_changes_nothing_yet(family: str, method: Method) -> None:
    base, wanted = model_of(SHAPES[family]).eval(), settings(method=method)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    model = adapted(base, wanted, trained=False).eval()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    torch.manual_seed(derive_seed(3, "adapters"))
    theirs = copy.deepcopy(base)
    targets = [name.removesuffix(".lora_A.weight") for name in adapter_weights(model) if "lora_A" in name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(peft_config(wanted, targets), theirs)
    own = adapter_weights(model)
    for name, value in theirs.named_parameters():
        if "lora_" in name:
            # peft measures the lengths of the rows in another order of sums.
            torch.testing.assert_close(own[peft_name(name)], value, rtol=1e-6 if "magnitude" in name else 0.0, atol=0.0)
    again, other = adapted(base, wanted, trained=False), copy.deepcopy(base)
    add_adapters(other, wanted, None, seed=4)
    assert all(torch.equal(value, own[name]) for name, value in adapter_weights(again).items())
    assert any(not torch.equal(value, own[name]) for name, value in adapter_weights(other).items())


def last_parts(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [
        ("llama", ("all-linear",), LLAMA_LAYERS),
        ("gpt2", ("all-linear",), {"c_attn", "c_proj", "c_fc"}),
        ("llama", ("q_proj", "mlp.up_proj"), {"q_proj", "up_proj"}),
        ("llama", ("layers.1.self_attn.o_proj",), {"o_proj"}),
    ],
)
def test_layers_that_are_adapted(family: str, targets: tuple[str, ...], layers: set[str]) -> None:
    model = adapted(model_of(SHAPES[family]), settings(targets=targets))
    assert last_parts(model) == layers
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == list(adapter_weights(model))
    assert all(parameter.dtype == torch.float32 for parameter in adapter_weights(model).values())


def test_experts_stay_as_they_are() -> None:
    values = {"model_type": "mixtral", **COMMON, "num_local_experts": 4}
    assert last_parts(adapted(model_of(values), settings())) == {"q_proj", "k_proj", "v_proj", "o_proj"}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
WIDTHS = {key: value for key, value in COMMON.items() if key != "head_dim"}
EXPERTS = {
    **{"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "num_key_value_heads": 4,
}
MIXTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "deepseek_v3": (
        {**WIDTHS, **EXPERTS, **LATENT},
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    ),
    "glm4_moe": ({**WIDTHS, **EXPERTS}, ATTENTION),
    "phimoe": ({**WIDTHS, "num_local_experts": 4}, ATTENTION),
    "llama4_text": ({**COMMON, "num_local_experts": 4, "intermediate_size_mlp": 64}, LLAMA_LAYERS),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_shared_experts_and_routers(tmp_path: Path, family: str) -> None:
    """peft takes the first for the stacked experts where their names are the same; the second are no linear layers."""
    values, layers = MIXTURES[family]
    base = model_of({"model_type": family, **values}, "sdpa").eval()
    model = adapted(base, settings()).eval()
    assert last_parts(model) == layers
    folder = saved(model, base, tmp_path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, trust_remote_code=False).eval()
        torch.testing.assert_close(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tower_for_images_is_left_alone(tmp_path: Path) -> None:
    text = {**COMMON, "layer_types": ["full_attention"] * 4}
    images = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_index": 61, "boi_token_index": 62, "eoi_token_index": 63}
    values = {"text_config": text, "vision_config": {**images, "image_size": 28, "patch_size": 14}, **tokens}
    base = model_of({"model_type": "gemma3", "mm_tokens_per_image": 4, **values}, "sdpa").eval()
    for targets in (("all-linear",), ("q_proj", "down_proj")):
        model = adapted(base, settings(targets=targets)).eval()
        names = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
        assert len(names) == 4 * (7 if targets == ("all-linear",) else 2)
        assert all(name.startswith("model.language_model.layers.") for name in names)
    folder, ids = saved(model, base, tmp_path), IDS % 60
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, trust_remote_code=False).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_peft_takes_for_experts_are_told(tmp_path: Path) -> None:
    base = model_of({"model_type": "deepseek_v3", **MIXTURES["deepseek_v3"][0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left_out = add_adapters(copy.deepcopy(base), settings(), None, seed=3)
    assert "model.layers.0.mlp.gate_proj" in left_out and "model.layers.1.mlp.shared_experts.up_proj" in left_out
    assert {name.rpartition(".")[2] for name in left_out} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ConfigError, match="takes down_proj of DeepseekV3ForCausalLM for its stacked experts"):
        adapted(base, settings(targets=("o_proj", "down_proj")))
    with pytest.raises(ConfigError, match=r"peft cannot adapt this model: Cannot convert .* gate_proj"):
        adapted(base, settings(targets=("gate_proj",)))
    assert add_adapters(model_of(SHAPES["llama"]), settings(), None, seed=3) == []


@pytest.mark.parametrize(
    ("targets", "phrases"),
    [
        (("q_prj",), ["no linear layer of LlamaForCausalLM is called 'q_prj'", "did you mean q_proj?", "up_proj"]),
        (("lm_head",), ["down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"]),
        (("embed_tokens",), ["is called 'embed_tokens'"]),
        (("proj",), ["is called 'proj'"]),
        (("up_proj", "nothing", "mlp"), ["'nothing'", "'mlp'"]),
    ],
)
def test_unknown_layers(targets: tuple[str, ...], phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(model_of(SHAPES["llama"]), settings(targets=targets))
    assert all(phrase in str(caught.value) for phrase in phrases), caught.value
    assert {problem.key for problem in caught.value.problems} == {"model.lora.target_modules"}


def test_model_that_peft_cannot_adapt() -> None:
    values = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64}
    with pytest.raises(ConfigError, match=r"peft cannot adapt this model: .*Mamba"):
        adapted(model_of(values, "eager"), settings())


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"model.lora.enabled: needs the package peft.*pip install 'truthgpt\[lora\]'"
    ):
        require_peft()


def saved(model: Any, base: PreTrainedModel, folder: Path, as_safetensors: bool = True) -> Path:
    base.save_pretrained(folder / "base")
    save_adapter_config(model, folder, str(folder / "base"))
    save_adapters(model, folder, as_safetensors)
    return folder


@pytest.mark.parametrize("as_safetensors", [True, False])
def test_saved_again_in_the_other_format_is_what_is_read(tmp_path: Path, as_safetensors: bool) -> None:
    model = adapted(model_of(SHAPES["llama"], "sdpa"), settings(), share=False)
    save_adapters(model, tmp_path, not as_safetensors)
    save_adapters(model, tmp_path, as_safetensors)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors" if as_safetensors else ".bin"]


@pytest.mark.parametrize("as_safetensors", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_for_peft_and_for_us(tmp_path: Path, family: str, method: Method, as_safetensors: bool) -> None:
    base = model_of(SHAPES[family], "sdpa").eval()
    model = adapted(base, settings(method=method), share=False).eval()
    folder = saved(model, base, tmp_path, as_safetensors)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder, trust_remote_code=False).eval()
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=5e-5)
        ours = copy.deepcopy(base)
        load_adapters(ours, folder)
        assert torch.equal(ours.eval()(input_ids=IDS).logits, expected)
    hold_frozen_in_bf16(ours)
    assert {weight.dtype for weight in adapter_weights(ours).values()} == {torch.float32}, "frozen like the base"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(config["target_modules"]) and config["fan_in_fan_out"] == (
        family == "gpt2"
    )


def with_bias(config: dict[str, Any]) -> None:
    config["lora_bias"] = True


def dora(config: dict[str, Any]) -> None:
    config["use_dora"] = True


def newer(config: dict[str, Any]) -> None:
    config["of_the_future"] = 1


def elsewhere(config: dict[str, Any]) -> None:
    config["target_modules"] = ["nowhere"]


def wider(config: dict[str, Any]) -> None:
    config["r"] = 8


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (with_bias, "more than a linear layer"),
        (dora, "lora_magnitude_vector is not on both sides"),
        (newer, "of_the_future"),
        (elsewhere, "nowhere"),
        (wider, "size mismatch"),
    ],
)
def test_adapters_that_cannot_be_loaded(tmp_path: Path, change: Callable[[dict[str, Any]], None], phrase: str) -> None:
    base = model_of(SHAPES["llama"])
    folder = saved(adapted(base, settings()), base, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=phrase):
        load_adapters(base, folder)
