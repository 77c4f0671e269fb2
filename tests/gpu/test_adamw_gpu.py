"""The kernel of AdamW gives what PyTorch's operations give, for every type of weight and gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from truthgpt.optim.adamw import AdamW

pytestmark = pytest.mark.gpu

SHAPES = [(2048,), (1000, 77), (3,), (), (4096, 33), (1, 5)]
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def weights_on(device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(device)) for shape in SHAPES]


def run(optimizer: AdamW, weights: list[torch.nn.Parameter], steps: range, scale: float | None = None) -> None:
    device = weights[0].device
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype).to(device)
        optimizer.found_inf = torch.tensor(float(step == 3), device=device)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=device)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_kernel_against_operations(dtype: torch.dtype, scale: float | None) -> None:
    """Step 3 is skipped."""
    there, here = weights_on("cuda", dtype), weights_on("cpu", dtype)
    on_gpu, on_cpu = AdamW(there, **SETTINGS), AdamW(here, **SETTINGS)
    run(on_gpu, there, range(8), scale)
    run(on_cpu, here, range(8), scale)
    for a, b in zip(there, here, strict=True):
        for name in on_cpu.state[b]:
            torch.testing.assert_close(on_gpu.state[a][name].cpu(), on_cpu.state[b][name], rtol=2e-5, atol=1e-6)
        last_bit = 2e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=last_bit, atol=1e-6)
        assert on_gpu.state[a]["step"].item() == 7


def test_late_gradients_of_two_types() -> None:
    """Every parameter counts its own steps, also where a step is a launch for each type."""
    lists = []
    for device in ("cuda", "cpu"):
        weights = weights_on(device, torch.float32)
        for weight in weights[1::2]:
            weight.data = weight.data.bfloat16()
        optimizer = AdamW(weights, **SETTINGS)
        for step in range(12):
            generator = torch.Generator().manual_seed(100 + step)
            for number, weight in enumerate(weights):
                gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype).to(device)
                weight.grad = None if step < 2 * number else gradient
            optimizer.step()
        lists.append([float(optimizer.state[weight]["step"]) for weight in weights])
        lists.append([weight.detach().float().cpu() for weight in weights])
    steps_there, there, steps_here, here = lists
    assert steps_there == steps_here == [12.0, 10.0, 8.0, 6.0, 4.0, 2.0]
    for number, (a, b) in enumerate(zip(there, here, strict=True)):
        torch.testing.assert_close(a, b, rtol=8e-3 if number % 2 else 2e-5, atol=1e-6)


def test_stochastic_rounding_is_right_in_the_mean_and_repeatable() -> None:
    ends = []
    for seed in (1, 1, 2):
        weights = [torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16, device="cuda"))]
        optimizer = AdamW(weights, lr=1e-4, weight_decay=0.0, rounding="stochastic", seed=seed)
        for _ in range(500):
            weights[0].grad = torch.full_like(weights[0], -1.0)
            optimizer.step()
        assert "master" not in optimizer.state[weights[0]]
        assert weights[0].float().mean().item() == pytest.approx(1.05, abs=2e-4)
        ends.append(weights[0].detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert ends[0].unique().numel() > 3


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_goes_on_exactly(rounding: Any) -> None:
    straight, resumed = weights_on("cuda", torch.bfloat16), weights_on("cuda", torch.bfloat16)
    whole, first = (AdamW(w, **SETTINGS, rounding=rounding) for w in (straight, resumed))
    run(whole, straight, range(10))
    run(first, resumed, range(5))
    second = AdamW(resumed, **SETTINGS, rounding=rounding)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_nothing_waits_for_the_device() -> None:
    weights = weights_on("cuda", torch.bfloat16)
    optimizer = AdamW(weights, **SETTINGS)
    run(optimizer, weights, range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
