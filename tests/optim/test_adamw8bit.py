"""torchao's 8-bit AdamW: near AdamW, numbers for learning rates, plain tensors in a checkpoint, exact resume."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from truthgpt.runtime.precision import OptimizerStep

pytest.importorskip("torchao")
if shutil.which("g++") is None:
    pytest.skip("torchao compiles its step", allow_module_level=True)

from truthgpt.optim.adamw8bit import AdamW8bit

torch.set_num_threads(1)

SHAPES = [(64, 128), (7,)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        generator = torch.Generator().manual_seed(100 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator) + 1.0
        optimizer.step()


def leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if inner is None:
        yield value
    else:
        for each in inner:
            yield from leaves(each)


def test_follows_adamw() -> None:
    """A small tensor exactly, one in 8 bits about."""
    ours, theirs = parameters(), parameters()
    start = parameters()
    optimizer = AdamW8bit(ours, **SETTINGS)
    run(optimizer, ours, range(10))
    run(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(10))
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
    moved = (theirs[0] - start[0]).norm()
    assert 0 < (ours[0] - theirs[0]).norm() < 0.1 * moved
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_goes_on_exactly_from_a_file_of_plain_tensors() -> None:
    straight, resumed = parameters(), parameters()
    whole = AdamW8bit(straight, **SETTINGS)
    run(whole, straight, range(8))
    first = AdamW8bit(resumed, **SETTINGS)
    run(first, resumed, range(3))
    assert {type(leaf) for leaf in leaves(first.state_dict())} <= {torch.Tensor, float, int, bool, type(None)}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    big, small = saved["state"][0], saved["state"][1]
    assert big["exp_avg"]["codes"].dtype == torch.uint8 and big["exp_avg"]["scale"].shape == (64 * 128 // 256,)
    assert big["exp_avg"]["signed"] and not big["exp_avg_sq"]["signed"]
    assert isinstance(small["exp_avg"], torch.Tensor) and saved["param_groups"][0]["lr"] == pytest.approx(1e-2 / 3)
    second = AdamW8bit(resumed, **SETTINGS)
    second.load_state_dict(saved)
    run(second, resumed, range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    ends = [list(leaves(optimizer.state_dict()["state"])) for optimizer in (whole, second)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*ends, strict=True))


def test_state_of_other_groups_is_refused() -> None:
    weights = parameters()
    saved = AdamW8bit([{"params": weights[:1]}, {"params": weights[1:]}], **SETTINGS).state_dict()
    rates = [group["lr"] for group in saved["param_groups"]]
    assert rates == [1e-2, 1e-2] and {type(rate) for rate in rates} == {float}, "before the first step, too"
    with pytest.raises(ValueError, match="parameter group"):
        AdamW8bit(weights, **SETTINGS).load_state_dict(saved)


def test_a_skipped_step_leaves_every_bit() -> None:
    weights = parameters()
    optimizer, step = AdamW8bit(weights, **SETTINGS), OptimizerStep()
    run(optimizer, weights, range(2))
    before = [leaf.clone() for leaf in leaves(optimizer.state_dict()["state"]) if isinstance(leaf, torch.Tensor)]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.full_like(weight, math.nan)
    step(optimizer, torch.ones(()), torch.ones(()))
    after = [leaf for leaf in leaves(optimizer.state_dict()["state"]) if isinstance(leaf, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip([*before, *kept], [*after, *weights], strict=True))
