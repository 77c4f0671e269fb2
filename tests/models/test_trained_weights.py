"""What a checkpoint of adapters holds, that it knows its base, and that every adapter is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.attention.packed_models import model_of
from tests.models.adapted_models import IDS, SHAPES, adapted, loss_and_gradients, settings

from truthgpt.errors import CheckpointError, ConfigError
from truthgpt.models.lora import Method
from truthgpt.models.trained_weights import (
    BASE_DIGEST,
    adapter_weights,
    base_state,
    check_adapters_are_reached,
    load_trained_state,
    trained_state,
)
from truthgpt.runtime.precision import hold_frozen_in_bf16


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", SHAPES)
def test_state_is_the_adapters(family: str, method: Method) -> None:
    base, wanted = model_of(SHAPES[family]), settings(method=method)
    model, other = adapted(base, wanted), adapted(base, wanted, trained=False)
    state = {name: value.clone() for name, value in trained_state(model).items()}
    assert state.keys() == {*adapter_weights(model), BASE_DIGEST}
    load_trained_state(other, state)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    below = base_state(model)
    assert below.keys() == base.state_dict().keys()
    assert all(torch.equal(below[name], value) for name, value in base.state_dict().items())
    assert trained_state(base).keys() == base.state_dict().keys()


def half(model: Any) -> None:
    hold_frozen_in_bf16(model)


def one_weight(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.base_layer.weight.data[3, 5] += 0.1


def two_rows(model: Any) -> None:
    weight = model.model.embed_tokens.weight.data
    weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.parametrize(("change", "same"), [(half, True), (one_weight, False), (two_rows, False)])
def test_adapters_know_their_base(change: Callable[[Any], None], same: bool) -> None:
    base = model_of(SHAPES["llama"])
    state = trained_state(adapted(base, settings()))
    other = adapted(base, settings(), trained=False)
    change(other)
    before = copy.deepcopy(adapter_weights(other))
    if same:
        load_trained_state(other, state)
        return
    with pytest.raises(CheckpointError, match="trained on a base model with other weights"):
        load_trained_state(other, state)
    assert all(torch.equal(value, before[name]) for name, value in adapter_weights(other).items())


def test_adapter_that_nothing_reaches() -> None:
    model = adapted(model_of(SHAPES["llama"]), settings())
    loss_and_gradients(model)
    check_adapters_are_reached(model)
    unused = model.model.layers[2].mlp.up_proj
    unused.lora_B.weight.grad = None
    with pytest.raises(ConfigError, match=r"no gradient reaches the adapter of model\.layers\.2\.mlp\.up_proj"):
        check_adapters_are_reached(model)
    check_adapters_are_reached(model_of(SHAPES["llama"]))  # one without adapters has none to reach
