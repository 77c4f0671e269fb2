"""Muon against a float64 transcription, against torch's own bit for bit, and what it does with a step to skip."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from truthgpt.optim.muon import Muon

torch.set_num_threads(1)

SHAPES = [(24, 16), (16, 24), (16, 16)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
Array = npt.NDArray[np.float64]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(weights: list[torch.nn.Parameter], step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = factor * torch.randn(weight.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(weights, step)
        optimizer.step()


def values(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    states = [optimizer.state[weight]["momentum_buffer"] for weight in weights]
    return [tensor.detach().clone() for tensor in (*weights, *states)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def orthogonalised(matrix: Array) -> Array:
    """Five quintic Newton-Schulz iterations with the coefficients of Jordan et al. 2024."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def reference(start: Array, gradients: list[Array], lr: float, decay: float, momentum: float) -> Array:
    """With Nesterov momentum, decoupled decay and the factor of Liu et al. 2025 (arXiv 2502.16982)."""
    theta, average = start.copy(), np.zeros_like(start)
    for g in gradients:
        average = momentum * average + (1 - momentum) * g
        update = orthogonalised((1 - momentum) * g + momentum * average)
        theta = theta * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(theta.shape)) * update
    return theta


def test_against_float64() -> None:
    """torch iterates in bf16: an update has two digits."""
    weights = parameters()
    starts = [weight.detach().double().numpy().copy() for weight in weights]
    gradients: list[list[Array]] = [[] for _ in weights]
    optimizer = Muon(weights, **SETTINGS)
    for step in range(4):
        give_gradients(weights, step)
        for kept, weight in zip(gradients, weights, strict=True):
            assert weight.grad is not None
            kept.append(weight.grad.double().numpy().copy())
        optimizer.step()
    for weight, start, kept in zip(weights, starts, gradients, strict=True):
        expected = reference(start, kept, 3e-3, 0.1, 0.9) - start
        moved = weight.detach().double().numpy() - start
        assert np.linalg.norm(moved - expected) < 0.03 * np.linalg.norm(expected)
        assert np.sqrt(np.mean(expected**2)) / (4 * 3e-3) == pytest.approx(0.2, rel=0.5), "about the RMS of AdamW"


@pytest.mark.parametrize("nesterov", [True, False])
def test_is_torchs_bit_for_bit(nesterov: bool) -> None:
    """Also where nothing is skipped, and whatever divides the gradients."""
    ours, theirs, scaled = parameters(), parameters(), parameters()
    first = Muon(ours, **SETTINGS, nesterov=nesterov)
    second = torch.optim.Muon(theirs, **SETTINGS, nesterov=nesterov)
    third = Muon(scaled, **SETTINGS, nesterov=nesterov)
    third.found_inf, third.grad_scale = torch.zeros(()), torch.tensor(8.0)
    for step in range(3):
        for optimizer, weights, factor in ((first, ours, 1.0), (second, theirs, 1.0), (third, scaled, 8.0)):
            give_gradients(weights, step, factor)
            optimizer.step()
    assert equal(values(first, ours), values(second, theirs))
    assert equal(values(first, ours), values(third, scaled))
    assert len(first.param_groups) == 1 and first.param_groups[0]["params"] == ours


@pytest.mark.parametrize("before", [0, 3])
def test_a_skipped_step_leaves_every_bit(before: int) -> None:
    weights = parameters()
    optimizer = Muon(weights, **SETTINGS)
    run(optimizer, weights, range(before))
    start = [weight.detach().clone() for weight in weights]
    give_gradients(weights, before, factor=math.nan)
    optimizer.found_inf = torch.ones(())
    expected = [*start, *(optimizer.state[w].get("momentum_buffer", torch.zeros_like(w)).clone() for w in weights)]
    optimizer.step()
    assert equal(values(optimizer, weights), expected)


def test_goes_on_exactly_from_a_saved_state() -> None:
    straight, resumed = parameters(), parameters()
    whole, first = Muon(straight, **SETTINGS), Muon(resumed, **SETTINGS)
    run(whole, straight, range(8))
    run(first, resumed, range(3))
    second = Muon(resumed, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, resumed, range(3, 8))
    assert equal(values(whole, straight), values(second, resumed))


def test_a_transposed_matrix_gets_the_transposed_update() -> None:
    """transformers' Conv1D stores `(in, out)`."""
    wide = torch.nn.Parameter(torch.randn(16, 48, generator=torch.Generator().manual_seed(1)))
    tall = torch.nn.Parameter(wide.detach().T.contiguous())
    optimizers = [Muon([weight], **SETTINGS) for weight in (wide, tall)]
    start = wide.detach().clone()
    for step in range(3):
        give_gradients([wide], step)
        assert wide.grad is not None
        tall.grad = wide.grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    moved = (wide - start).norm()
    assert (wide - tall.T).norm() < 0.02 * moved


def test_what_has_no_gradient_stays() -> None:
    weights = parameters()
    optimizer = Muon(weights, **SETTINGS)
    give_gradients(weights, 0)
    weights[1].grad = None
    before = [weight.detach().clone() for weight in weights]
    assert optimizer.step(lambda: 2.5) == 2.5
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [False, True, False]
