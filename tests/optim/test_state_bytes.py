"""The bytes that are planned for an optimizer are those of its state after a step."""

from __future__ import annotations

import pytest
import torch
from tests.attention.packed_models import FAMILIES, model_of

from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.optim.groups import parameter_groups
from truthgpt.optim.state_bytes import optimizer_bytes
from truthgpt.runtime.precision import hold_weights_in_bf16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "weights"), [*((name, "float32") for name in OPTIMIZERS.names()), ("adamw", "bf16_master")]
)
def test_bytes_of_the_state(name: str, weights: str, family: str) -> None:
    available = OPTIMIZERS.entry(name).probe()
    if not available.available:
        pytest.skip(available.reason or name)
    model = model_of(FAMILIES[family], "sdpa")
    if weights != "float32":
        hold_weights_in_bf16(model, sum_in_float32=False)
    groups = parameter_groups(model, 0.1)
    planned = optimizer_bytes(name, groups, weights)
    optimizer = OPTIMIZERS.build(
        name, {}, params=groups, lr=1e-3, weight_decay=0.1, fused=True, weights=weights, seed=0
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    counted = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor) and t.ndim)
    assert planned == pytest.approx(counted, rel=0.02)


def test_another_optimizer_is_not_listed() -> None:
    assert optimizer_bytes("mine", [], "float32") is None
