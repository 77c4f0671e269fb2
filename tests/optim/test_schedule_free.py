"""schedulefree's AdamW against a float64 transcription; its average at any time, and its progress in a checkpoint."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("schedulefree")

import schedulefree

from truthgpt.optim.schedule_free import ScheduleFreeAdamW

torch.set_num_threads(1)

SHAPES = [(6, 4), (5,)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
WARM_UP = 4
Array = npt.NDArray[np.float64]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))


def factor(step: int) -> float:
    return min((step + 1) / WARM_UP, 1.0)


def run(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range, rates: bool = True) -> None:
    for step in steps:
        for weight in weights:
            weight.grad = gradient(tuple(weight.shape), step).to(weight.dtype)
        for group in optimizer.param_groups if rates else ():
            group["lr"] = 1e-2 * factor(step)
        optimizer.step()


def reference(start: Array, steps: int) -> tuple[Array, Array]:
    """x and y of Defazio et al. 2024, algorithm 1, decay at y; weights of the average: squared learning rates."""
    x, z, v, total = start.copy(), start.copy(), np.zeros_like(start), 0.0
    y = start
    for step in range(steps):
        y = 0.1 * z + 0.9 * x
        g = gradient(start.shape, step).double().numpy()
        rate = 1e-2 * factor(step)
        v = 0.99 * v + 0.01 * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-6) + 0.1 * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
    return x, 0.1 * z + 0.9 * x


def test_against_float64() -> None:
    weights = parameters()
    starts = [weight.detach().double().numpy().copy() for weight in weights]
    optimizer = ScheduleFreeAdamW(weights, **SETTINGS)
    assert all(torch.equal(optimizer.averaged(weight), weight) for weight in weights), "before the first step"
    run(optimizer, weights, range(12))
    for weight, start in zip(weights, starts, strict=True):
        x, y = reference(start, 12)
        np.testing.assert_allclose(weight.detach().numpy(), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(optimizer.averaged(weight).numpy(), x, rtol=1e-5, atol=1e-6)


def test_warm_up_of_the_schedule_is_the_librarys_own() -> None:
    ours, theirs = parameters(), parameters()
    run(ScheduleFreeAdamW(ours, **SETTINGS), ours, range(8))
    library = schedulefree.AdamWScheduleFree(theirs, **SETTINGS, warmup_steps=WARM_UP)
    library.train()
    run(library, theirs, range(8), rates=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_average_is_a_copy() -> None:
    looked, alone = parameters(), parameters()
    optimizer = ScheduleFreeAdamW(looked, **SETTINGS)
    for step in range(6):
        run(optimizer, looked, range(step, step + 1))
        assert not torch.equal(optimizer.averaged(looked[0]).zero_(), looked[0])
    run(ScheduleFreeAdamW(alone, **SETTINGS), alone, range(6))
    assert all(torch.equal(a, b) for a, b in zip(looked, alone, strict=True))


def test_goes_on_exactly_from_a_file() -> None:
    """Also where the settings of the groups are written over after loading, as the engine does."""
    straight, resumed = parameters(), parameters()
    whole, first = ScheduleFreeAdamW(straight, **SETTINGS), ScheduleFreeAdamW(resumed, **SETTINGS)
    run(whole, straight, range(10))
    run(first, resumed, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert saved["param_groups"][0]["k"] == 3 and saved["param_groups"][0]["train_mode"]
    second = ScheduleFreeAdamW(resumed, **SETTINGS)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in second.param_groups]
    assert settings[0].keys().isdisjoint({"k", "weight_sum", "lr_max", "train_mode"})
    second.load_state_dict(saved)
    for group, values in zip(second.param_groups, settings, strict=True):
        group.update(values)
    run(second, resumed, range(3, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert second.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_weights_made_with_another_beta_are_refused() -> None:
    weights = parameters()
    optimizer = ScheduleFreeAdamW(weights, **SETTINGS)
    run(optimizer, weights, range(2))
    with pytest.raises(ValueError, match=r"betas\[0\] 0.9, not 0.8"):
        ScheduleFreeAdamW(weights, **{**SETTINGS, "betas": (0.8, 0.99)}).load_state_dict(optimizer.state_dict())
    ScheduleFreeAdamW(weights, **{**SETTINGS, "betas": (0.9, 0.5)}).load_state_dict(optimizer.state_dict())


def test_the_closure_is_called() -> None:
    assert ScheduleFreeAdamW(parameters(), **SETTINGS).step(lambda: 1.5) == 1.5
