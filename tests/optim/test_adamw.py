"""Our AdamW against torch's, in float32 and with bf16 weights; what the GPU's kernel does is in tests/gpu."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from truthgpt.optim.adamw import AdamW, float32_copy, round_stochastically

SHAPES = [(5, 3), (7,), (), (2, 3, 4), (1, 1)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(weights: list[torch.nn.Parameter], step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = (factor * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def run(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(weights, step)
        optimizer.step()


def values(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    states = [optimizer.state[weight][name] for weight in weights for name in sorted(optimizer.state[weight])]
    return [tensor.detach().clone() for tensor in (*weights, *states)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def test_float32_weights_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    run(AdamW(ours, **SETTINGS), ours, range(20))
    run(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_comes_late_begins_at_its_own_first_step() -> None:
    """As that of an expert which no token reached before."""
    ours, theirs = parameters(), parameters()
    for kind, weights in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(weights, **SETTINGS)
        for step in range(12):
            give_gradients(weights, step)
            for number, weight in enumerate(weights):
                if step < 3 * number or step == 9 + number:
                    weight.grad = None
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_groups_have_their_own_settings() -> None:
    ours, theirs = parameters(), parameters()
    for kind, weights in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": weights[:2], "weight_decay": 0.0, "lr": 1e-2}, {"params": weights[2:]}]
        run(kind(groups, **SETTINGS), weights, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_weights_with_a_master_copy_are_rounded_float32_weights() -> None:
    half = parameters(torch.bfloat16)
    full = [torch.nn.Parameter(weight.detach().float()) for weight in half]
    optimizer, reference = AdamW(half, **SETTINGS), AdamW(full, **SETTINGS)
    for step in range(30):
        give_gradients(half, step)
        for a, b in zip(half, full, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
    for a, b in zip(half, full, strict=True):
        assert torch.equal(float32_copy(optimizer, a), b) and torch.equal(a, b.bfloat16())
    assert {optimizer.state[w]["exp_avg_sq"].dtype for w in half} == {torch.float32}


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_updates_below_the_last_bit_add_up(rounding: Any) -> None:
    """2,000 steps of a ten-thousandth: plain bf16 would stay at 1.0, whose next neighbour is 1.0078."""
    weights = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))]
    optimizer = AdamW(weights, lr=1e-4, weight_decay=0.0, rounding=rounding)
    for _ in range(2000):
        weights[0].grad = torch.full_like(weights[0], -1.0)
        optimizer.step()
    assert weights[0].float().mean().item() == pytest.approx(1.2, abs=4e-3)


def test_stochastic_rounding_takes_neighbours_and_is_right_in_the_mean() -> None:
    values = torch.tensor([1.0, 1.001, -1.001, 3.1415, 1e-30, -0.0, float("inf")]).repeat(20_000, 1)
    rounded = round_stochastically(values, seed=1)
    assert torch.equal(rounded, round_stochastically(values, seed=1))
    assert not torch.equal(rounded, round_stochastically(values, seed=2))
    exact = rounded[:, [0, 5, 6]]
    assert torch.equal(exact, values[:, [0, 5, 6]].bfloat16())
    means, expected = rounded[:, 1:5].double().mean(0), values[0, 1:5].double()
    torch.testing.assert_close(means, expected, rtol=3e-4, atol=0.0)
    assert set(rounded[:, 1].tolist()) == {1.0, 1.0078125}


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_leaves_every_bit(rounding: Any, dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    optimizer = AdamW(weights, **SETTINGS, rounding=rounding)
    run(optimizer, weights, range(3))
    before = values(optimizer, weights)
    give_gradients(weights, 3, factor=math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert equal(values(optimizer, weights), before)


def test_gradients_are_divided_by_the_scale_and_kept() -> None:
    plain, scaled = parameters(), parameters()
    first, second = AdamW(plain, **SETTINGS), AdamW(scaled, **SETTINGS)
    give_gradients(plain, 0)
    give_gradients(scaled, 0, factor=8.0)
    second.grad_scale = torch.tensor(8.0)
    kept = [weight.grad.clone() for weight in scaled]
    first.step()
    second.step()
    assert equal(values(first, plain), values(second, scaled))
    assert all(torch.equal(weight.grad, grad) for weight, grad in zip(scaled, kept, strict=True))


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_goes_on_exactly_from_a_saved_state(rounding: Any, dtype: torch.dtype) -> None:
    straight, resumed = parameters(dtype), parameters(dtype)
    whole = AdamW(straight, **SETTINGS, rounding=rounding)
    run(whole, straight, range(10))
    first = AdamW(resumed, **SETTINGS, rounding=rounding)
    run(first, resumed, range(4))
    saved = copy.deepcopy(first.state_dict())
    second = AdamW(resumed, **SETTINGS, rounding=rounding)
    second.load_state_dict(saved)
    run(second, resumed, range(4, 10))
    assert equal(values(whole, straight), values(second, resumed))


def test_takes_the_state_of_torchs_adamw() -> None:
    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    run(reference, theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    optimizer = AdamW(ours, **SETTINGS)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    run(optimizer, ours, range(5, 10))
    run(reference, theirs, range(5, 10))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        AdamW(parameters(), **{**SETTINGS, **wrong})


def test_refuses_what_it_cannot_update() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4).T)
    weight.grad = torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match="contiguous"):
        AdamW([weight], lr=0.1).step()
