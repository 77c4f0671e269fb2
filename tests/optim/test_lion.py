"""Lion against a float64 transcription of the paper, and its device-side skipping."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.optim.lion import Lion

torch.set_num_threads(1)

Array = npt.NDArray[np.float64]
SHAPES = [(5, 3), (7,), (), (2, 3, 4), (1, 1)]


def reference_lion(
    start: Array, gradients: list[Array], lr: float, betas: tuple[float, float], weight_decay: float
) -> Array:
    """Algorithm 2 of the paper, one array at a time."""
    beta1, beta2 = betas
    theta, momentum = start.copy(), np.zeros_like(start)
    for gradient in gradients:
        c = beta1 * momentum + (1 - beta1) * gradient
        theta = theta - lr * (np.sign(c) + weight_decay * theta)
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return theta


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def momenta(optimizer: Lion) -> list[torch.Tensor]:
    return [state["exp_avg"] for state in optimizer.state.values()]


def run_steps(optimizer: Lion, parameters: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def new_parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-5, 0.1),
    # A beta2 below the rounding error keeps a trace of the momentum on paper only; its sign would still count.
    betas=st.tuples(st.floats(0, 0.999), st.floats(0.1, 0.999)),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_matches_the_paper(seed: int, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    rng = np.random.default_rng(seed)
    starts = [rng.normal(size=shape) for shape in SHAPES]
    gradients = [[rng.normal(size=shape) * rng.choice([0.0, 1.0, 1e-4]) for shape in SHAPES] for _ in range(40)]
    parameters = [torch.tensor(start, dtype=torch.float64, requires_grad=True) for start in starts]
    optimizer = Lion(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    for index, parameter in enumerate(parameters):
        expected = reference_lion(starts[index], [g[index] for g in gradients], lr, betas, weight_decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_each_group_uses_its_own_settings() -> None:
    first, second, third = (torch.ones(3, requires_grad=True) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": 0.5}, {"params": [second], "lr": 0.1}]
    optimizer = Lion([*groups, {"params": [third]}], lr=0.01)
    for parameter in (first, second):
        parameter.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((3,), 1 - 0.01 * 1.5))
    torch.testing.assert_close(second.detach(), torch.full((3,), 0.9))
    assert torch.equal(third, torch.ones(3)), "a parameter without gradient stays"
    assert third not in optimizer.state


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1.0])
def test_found_inf_leaves_every_bit(poison: float, shape: tuple[int, ...]) -> None:
    parameters = new_parameters()
    optimizer = Lion(parameters, lr=0.1, weight_decay=0.1)
    run_steps(optimizer, parameters, range(3))
    with torch.no_grad():  # negative zeros are the bits that adding 0.0 would change
        parameters[0][0, 0] = -0.0
        momenta(optimizer)[0][0, 0] = -0.0
    before = bits(parameters) + bits(momenta(optimizer))
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, poison)
    optimizer.found_inf = torch.ones(shape)  # type: ignore[attr-defined]
    optimizer.step()
    assert bits(parameters) + bits(momenta(optimizer)) == before

    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.found_inf = torch.zeros(shape)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(old != new for old, new in zip(before, bits(parameters) + bits(momenta(optimizer)), strict=True))


def test_found_inf_of_zero_changes_nothing() -> None:
    plain, masked = new_parameters(), new_parameters()
    plain_optimizer = Lion(plain, lr=0.1, weight_decay=0.1)
    masked_optimizer = Lion(masked, lr=0.1, weight_decay=0.1)
    masked_optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    run_steps(plain_optimizer, plain, range(5))
    run_steps(masked_optimizer, masked, range(5))
    assert bits(plain) == bits(masked)


def test_skip_at_the_first_step() -> None:
    parameters = new_parameters()
    before = bits(parameters)
    optimizer = Lion(parameters, lr=0.1, weight_decay=0.1)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    run_steps(optimizer, parameters, range(1))
    assert bits(parameters) == before
    assert all(not momentum.any() for momentum in momenta(optimizer))


def test_grad_scale_divides_the_gradients() -> None:
    plain, scaled = new_parameters(), new_parameters()
    plain_optimizer, optimizer = Lion(plain, lr=0.1), Lion(scaled, lr=0.1)
    run_steps(plain_optimizer, plain, range(4))
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in scaled:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1024.0
        optimizer.step()
    assert bits(plain) == bits(scaled)
    # The sign hides a wrong scale, the momentum does not.
    assert bits(momenta(plain_optimizer)) == bits(momenta(optimizer))
    assert scaled[0].grad is not None
    assert scaled[0].grad.abs().max() > 100, "the caller's gradients stay as they were"


def test_state_round_trip_continues_bit_for_bit() -> None:
    straight = new_parameters()
    run_steps(Lion(straight, lr=0.05, weight_decay=0.1), straight, range(10))

    first = new_parameters()
    optimizer = Lion(first, lr=0.05, weight_decay=0.1)
    run_steps(optimizer, first, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    second = [parameter.detach().clone().requires_grad_() for parameter in first]
    resumed = Lion(second, lr=0.7)
    resumed.load_state_dict(saved)
    run_steps(resumed, second, range(4, 10))
    assert bits(second) == bits(straight)


def test_bf16_parameters_and_mixed_dtypes() -> None:
    low, full = torch.ones(4, dtype=torch.bfloat16, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = Lion([low, full], lr=0.25)
    low.grad, full.grad = torch.ones_like(low), -torch.ones_like(full)
    optimizer.step()
    assert low.tolist() == [0.75] * 4
    assert full.tolist() == [1.25] * 4


def test_closure_runs_with_gradients() -> None:
    parameter = torch.tensor([2.0], requires_grad=True)
    optimizer = Lion([parameter], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert parameter.item() == 1.5


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1.0}])
def test_refuses_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Lion([torch.ones(1, requires_grad=True)], **bad)


def test_refuses_sparse_gradients() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Lion(table.parameters()).step()
