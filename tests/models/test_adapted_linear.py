"""Our forward pass of an adapted layer is peft's: eager, with shared products, in bf16, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tests.attention.packed_models import model_of
from tests.models.adapted_models import (
    IDS,
    METHODS,
    SHAPES,
    adapted,
    by_peft,
    differences,
    error_of_all,
    loss_and_gradients,
    settings,
)
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from truthgpt.memory.base import EVERY_LAYER
from truthgpt.models.adapted_linear import AdaptedLinear, SharedInput, share_inputs
from truthgpt.models.causal_lm import enable_gradient_checkpointing
from truthgpt.models.dora_linear import DoraLinear
from truthgpt.models.lora import Method
from truthgpt.models.trained_weights import adapter_weights
from truthgpt.runtime.precision import hold_frozen_in_bf16


@pytest.mark.parametrize("share", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SHAPES)
def test_loss_and_gradients_are_pefts(family: str, method: Method, share: bool) -> None:
    base, wanted = model_of(SHAPES[family]).double(), settings(method=method)
    ours = adapted(base, wanted, share=share)
    theirs = by_peft(base, ours, wanted)
    assert max(differences(loss_and_gradients(ours.double()), loss_and_gradients(theirs.double()))) < 1e-12


class FixedMask(nn.Module):
    """Dropout whose mask depends on the shape only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(x.shape[-1])) < 0.8
        return x * mask.to(x.dtype) / 0.8


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", SHAPES)
def test_with_dropout_too(family: str, method: Method) -> None:
    base, wanted = model_of(SHAPES[family]).double(), settings(dropout=0.25, method=method)
    ours = adapted(base, wanted)
    theirs = by_peft(base, ours, wanted)
    found = []
    for model in (ours.double(), theirs.double()):
        torch.manual_seed(7)  # layer by layer the same draws
        found.append(loss_and_gradients(model))
    assert max(differences(*found)) < 1e-12
    assert differences(found[0], loss_and_gradients(ours))[0] > 1e-6, "dropout was off"


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", SHAPES)
def test_in_bf16_no_further_from_the_truth_than_peft(family: str, dropout: float, method: Method) -> None:
    base, wanted = model_of(SHAPES[family]), settings(dropout, method=method)
    hold_frozen_in_bf16(base.requires_grad_(False))
    ours = adapted(base, wanted)
    for name, weight in adapter_weights(ours).items():
        # Large ones make a chaos of so small a model, in which no rounding can be told from another.
        weight.mul_(1.0 if name.endswith("magnitude_vector") else 0.25)
    theirs = by_peft(base, ours, wanted)
    exact = by_peft(base.float(), ours, wanted)
    for model in (ours, theirs, exact):
        for module in model.modules():
            if isinstance(module, AdaptedLinear) and dropout:
                module.lora_dropout = FixedMask()
            elif isinstance(module, LoraLayer) and dropout:
                module.lora_dropout["default"] = FixedMask()
    assert {p.dtype for p in ours.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in adapter_weights(ours).values()} == {torch.float32}
    truth = loss_and_gradients(exact)
    own, peft = (error_of_all(loss_and_gradients(model), truth) for model in (ours, theirs))
    assert own < 1.5 * peft and own < 0.03


class Outputs(TorchDispatchMode):
    """Notes the types of everything that is computed with a row a token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self.tokens in result.shape:
            self.types.add(result.dtype)
        return result


def test_activations_keep_their_type() -> None:
    base = model_of(SHAPES["llama"])
    hold_frozen_in_bf16(base.requires_grad_(False))
    layer = adapted(base, settings(dropout=0.1)).model.layers[0].mlp.up_proj.train()
    x = torch.randn(37, 32, dtype=torch.bfloat16, requires_grad=True)
    with Outputs(tokens=37) as outputs:
        layer(x).sum().backward()
    assert torch.bfloat16 in outputs.types and outputs.types <= {torch.bfloat16, torch.bool}
    assert layer.lora_A.weight.grad.dtype == torch.float32


def test_dora_begins_with_the_lengths_of_the_rows_and_is_fit_for_rows_of_zeros() -> None:
    weight = torch.randn(5, 8, dtype=torch.float64)
    weight[2] = 0.0
    base = nn.Linear(8, 5).double()
    base.weight.data.copy_(weight)
    layer = DoraLinear(base, nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False), nn.Identity(), 1.5).double()
    a, b = layer.lora_A.weight, layer.lora_B.weight
    torch.testing.assert_close(layer.norms(), (weight + 1.5 * b @ a).norm(dim=1))
    nn.init.zeros_(layer.lora_B.weight)
    layer.lora_magnitude_vector.data.copy_(layer.norms())
    torch.testing.assert_close(layer.lora_magnitude_vector.data, weight.norm(dim=1))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


def test_small_change_of_a_magnitude_counts_in_bf16() -> None:
    """Of 0.35 percent: bf16 has no number between 1 and 1.0078."""
    base = nn.Linear(8, 64, bias=False).bfloat16()
    layer = DoraLinear(base, nn.Linear(8, 2, bias=False), nn.Linear(2, 64, bias=False), nn.Identity(), 1.0)
    nn.init.zeros_(layer.lora_B.weight)
    layer.lora_magnitude_vector.data = layer.norms() * 1.0035
    x = torch.randn(32, 8, dtype=torch.bfloat16)
    assert float((layer(x) != base(x)).float().mean()) > 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SHAPES)
def test_merged_weight_computes_the_same(family: str, method: Method) -> None:
    model = adapted(model_of(SHAPES[family]).double(), settings(method=method), share=False).double()
    for layer in [module for module in model.modules() if isinstance(module, AdaptedLinear)][:3]:
        x = torch.randn(3, layer.lora_A.weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(torch.nn.functional.linear(x, layer.merged(), layer.bias), layer(x))


def test_weight_and_bias_are_the_bases() -> None:
    """Some models ask a layer for the type or device of its weight."""
    layer = adapted(model_of(SHAPES["gpt2"]), settings()).transformer.h[0].attn.c_attn
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert adapted(model_of(SHAPES["llama"]), settings()).model.layers[0].mlp.up_proj.bias is None


def sharing(model: nn.Module) -> list[list[str]]:
    names = {id(module): name for name, module in model.named_modules()}
    groups = {id(m._shared): m._shared for m in model.modules() if isinstance(m, AdaptedLinear) and m._shared}
    return [[names[id(layer)].rpartition(".")[2] for layer in group._layers] for group in groups.values()]


def test_layers_with_one_input_share() -> None:
    base = model_of(SHAPES["llama"])
    assert sharing(adapted(base, settings())) == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 4
    assert sharing(adapted(base, settings(targets=("q_proj", "v_proj", "down_proj")))) == [["q_proj", "v_proj"]] * 4
    assert sharing(adapted(base, settings(dropout=0.1))) == []
    assert sharing(adapted(model_of(SHAPES["gpt2"]), settings())) == []


def test_sharing_survives_what_the_model_does_otherwise() -> None:
    attention = adapted(model_of(SHAPES["llama"]), settings()).model.layers[0].self_attn
    first, second = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    alone = [
        layer.base_layer(x) + layer.scaling * layer.lora_B(layer.lora_A(x))
        for layer, x in ((attention.q_proj, first), (attention.k_proj, second), (attention.v_proj, first))
    ]
    together = [attention.q_proj(first), attention.k_proj(second), attention.v_proj(first)]
    for own, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(own, expected)
    torch.testing.assert_close(
        attention.v_proj(second),
        attention.v_proj.base_layer(second) + 3 * (attention.v_proj.lora_B(attention.v_proj.lora_A(second))),
    )
    shared: SharedInput = attention.q_proj._shared
    assert shared._input is None and shared._products == (), "kept beyond the last layer"


def test_a_layer_called_twice_shares_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [(nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)) for _ in range(2)]
            self.one, self.two = (AdaptedLinear(*part, nn.Identity(), 1.0) for part in parts)
            self.embedding = nn.Embedding(64, 4)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.one(x) + self.two(self.one(x))

    model = Twice()
    share_inputs(model, IDS)
    assert sharing(model) == []


@pytest.mark.parametrize(
    ("family", "method", "dropout", "checkpointing"),
    [
        ("llama", "lora", 0.0, False),
        ("llama", "lora", 0.0, True),
        ("llama", "lora", 0.1, False),
        ("llama", "dora", 0.0, False),
        ("llama", "dora", 0.1, True),
        ("gpt2", "lora", 0.0, False),
        ("gpt2", "dora", 0.0, False),
        ("qwen3", "lora", 0.0, False),
    ],
)
def test_compiled_layers_are_whole_graphs(family: str, method: Method, dropout: float, checkpointing: bool) -> None:
    """At most one graph for the first layer, whose input needs no gradient, and one for all others; none later."""
    torch._dynamo.reset()
    counters.clear()
    values = {**SHAPES[family], "layer_types": ["full_attention"] * 4} if family == "qwen3" else SHAPES[family]
    model = adapted(
        model_of(values, "sdpa").double(), settings(dropout, method=method), share=not checkpointing
    ).double()
    if checkpointing:
        enable_gradient_checkpointing(model, EVERY_LAYER)
    torch.manual_seed(2)
    eager = loss_and_gradients(model)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    graphs = []
    for _ in range(3):
        torch.manual_seed(2)
        assert max(differences(loss_and_gradients(model), eager)) < 1e-12
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3 and 1 <= graphs[0] <= 2 and not counters["graph_break"]
    torch._dynamo.reset()
