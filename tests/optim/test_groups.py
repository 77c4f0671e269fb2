"""Weight decay touches matrices only, Muon the layers' matrices, by kind of module, on real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from truthgpt.optim.groups import parameter_groups

torch.set_num_threads(1)

GPT2 = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
GPT2_MATRICES = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
LLAMA_MATRICES = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {
    f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
}


def build(model_type: str, **values: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    return model


def decayed(model: nn.Module, groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without decay; fails when one comes twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(listed) == len({name for name, _ in listed})
    return {name for name, decay in listed if decay == 0.1}, {name for name, decay in listed if decay == 0.0}


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied: bool) -> None:
    model = build("gpt2", **GPT2, tie_word_embeddings=tied)
    with_decay, without = decayed(model, parameter_groups(model, 0.1))
    expected = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in GPT2_MATRICES}
    assert with_decay == expected | (set() if tied else {"lm_head.weight"})
    assert with_decay | without == {name for name, _ in model.named_parameters()}
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"} <= without
    assert "transformer.h.0.attn.c_attn.bias" in without


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    model = build("llama", **LLAMA, tie_word_embeddings=tied)
    with_decay, without = decayed(model, parameter_groups(model, 0.1))
    expected = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LLAMA_MATRICES}
    assert with_decay == expected | (set() if tied else {"lm_head.weight"})
    assert with_decay | without == {name for name, _ in model.named_parameters()}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= without


def test_experts_and_routers_decay_their_biases_do_not() -> None:
    model = build("gpt_oss", **LLAMA, head_dim=8, num_local_experts=4)
    with_decay, without = decayed(model, parameter_groups(model, 0.1))
    mlp = "model.layers.0.mlp"
    assert {f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj", f"{mlp}.router.weight"} <= with_decay
    assert {f"{mlp}.experts.gate_up_proj_bias", f"{mlp}.router.bias", "model.layers.0.self_attn.sinks"} <= without


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert decayed(model, groups) == (set(), {"0.weight", "2.weight", "2.bias"})
    assert len(groups) == 1, "an empty group is left out"


def test_convolutions_decay_and_class_tokens_do_not() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.projection = nn.Conv2d(3, 8, kernel_size=4)
            self.norm = nn.GroupNorm(2, 8)

    model = Patches()
    assert decayed(model, parameter_groups(model, 0.1))[0] == {"projection.weight"}


def test_order_is_that_of_the_model() -> None:
    model = build("llama", **LLAMA)
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    for group in parameter_groups(model, 0.1):
        indices = [order[id(parameter)] for parameter in group["params"]]
        assert indices == sorted(indices)


def named(model: nn.Module, kind: str) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for group in parameter_groups(model, 0.1) if group["kind"] == kind]
    return {names[id(parameter)] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("model_type", "sizes", "layers", "matrices"),
    [("gpt2", GPT2, "transformer.h", GPT2_MATRICES), ("llama", LLAMA, "model.layers", LLAMA_MATRICES)],
)
def test_hidden_matrices_are_those_of_the_layers(
    model_type: str, sizes: dict[str, Any], layers: str, matrices: set[str], tied: bool
) -> None:
    """The output head is none, tied or not."""
    model = build(model_type, **sizes, tie_word_embeddings=tied)
    assert named(model, "hidden") == {f"{layers}.{layer}.{name}" for layer in range(2) for name in matrices}
    assert named(model, "matrix") == (set() if tied else {"lm_head.weight"})


def test_stacks_of_experts_and_their_router_are_no_hidden_matrices() -> None:
    model = build("gpt_oss", **LLAMA, head_dim=8, num_local_experts=4)
    mlp = "model.layers.0.mlp"
    assert {f"{mlp}.experts.gate_up_proj", f"{mlp}.router.weight", "lm_head.weight"} <= named(model, "matrix")
    attention = {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in range(2) for p in "qkvo"}
    assert named(model, "hidden") == attention


def test_kinds_of_nested_shared_and_tied_layers() -> None:
    class Mixed(nn.Module):
        """Lists in lists, a shared layer, an embedding tied to a layer inside, and a convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 2)]) for _ in range(2)])
            self.stages[1][0] = self.stages[0][0]
            self.embedding = nn.Embedding(5, 4)
            self.stages.append(nn.Linear(4, 5))
            self.stages[2].weight = self.embedding.weight

    model = Mixed()
    assert named(model, "hidden") == {"stages.0.0.weight"}
    assert named(model, "matrix") == {"stem.weight", "stages.0.1.weight", "stages.1.1.weight"}
    assert {"stages.0.0.bias", "stages.2.weight"} <= named(model, "other")
