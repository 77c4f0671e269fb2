"""Two optimizers as one: the same updates, one state, each part loading and skipping in its own way."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from truthgpt.optim.adamw import AdamW
from truthgpt.optim.joined import Joined
from truthgpt.optim.muon import Muon
from truthgpt.runtime.precision import OptimizerStep

torch.set_num_threads(1)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def parts_of(layer: nn.Linear) -> list[torch.optim.Optimizer]:
    return [Muon([{"params": [layer.weight], "kind": "hidden"}], lr=1e-2), AdamW([layer.bias], lr=1e-3)]


def give_gradients(layer: nn.Linear, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(layer: nn.Linear, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        give_gradients(layer, step)
        for optimizer in optimizers:
            optimizer.step()


def same(first: nn.Linear, second: nn.Linear) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_is_its_parts() -> None:
    alone, together = model(), model()
    run(alone, parts_of(alone), range(5))
    run(together, [Joined(parts_of(together))], range(5))
    assert same(alone, together) and not same(alone, model())


def test_a_rate_set_here_is_the_parts_rate() -> None:
    layer = model()
    optimizer = Joined(parts_of(layer))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(layer, [optimizer], range(2))
    assert same(layer, model())


def test_goes_on_exactly_from_a_file() -> None:
    straight, resumed = model(), model()
    run(straight, [Joined(parts_of(straight))], range(8))
    first = Joined(parts_of(resumed))
    run(resumed, [first], range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert [sorted(saved["state"][index]) for index in (0, 1)] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]
    assert [group.get("kind") for group in saved["param_groups"]] == ["hidden", None]
    second = Joined(parts_of(resumed))
    second.load_state_dict(saved)
    run(resumed, [second], range(3, 8))
    assert same(straight, resumed)
    assert second.state[resumed.weight]["momentum_buffer"].shape == (4, 6), "one state, after loading too"


def test_other_groups_are_refused() -> None:
    layer = model()
    saved = Joined(parts_of(layer)).state_dict()
    with pytest.raises(ValueError, match="2 parameter groups, this optimizer 1"):
        Joined(parts_of(layer)[:1]).load_state_dict(saved)


@pytest.mark.parametrize("second", [AdamW, torch.optim.SGD])
def test_every_part_is_skipped(second: type[torch.optim.Optimizer]) -> None:
    """Those that cannot skip on the device, too."""
    layer = model()
    optimizer = Joined([Muon([layer.weight], lr=1e-2), second([layer.bias], lr=1e-2)])  # type: ignore[call-arg]
    step = OptimizerStep()
    give_gradients(layer, 0)
    step(optimizer, torch.zeros(()), torch.ones(()))
    before, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    step(optimizer, torch.ones(()), torch.ones(()))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in values.items() if value is not None)
    give_gradients(layer, 1)
    step(optimizer, torch.zeros(()), torch.ones(()))
    assert not any(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradients_are_divided_for_every_part() -> None:
    """By another number every step: neither update depends on one that never changes."""
    plain, scaled = model(), model()
    first, second = Joined(parts_of(plain)), Joined(parts_of(scaled))
    for number in range(3):
        for layer, optimizer, divisor in ((plain, first, 1.0), (scaled, second, 4.0**number)):
            give_gradients(layer, number)
            for parameter in layer.parameters():
                parameter.grad = parameter.grad * divisor if parameter.grad is not None else None
            OptimizerStep()(optimizer, torch.zeros(()), torch.tensor(divisor))
    assert same(plain, scaled)


def test_the_closure_is_called_once() -> None:
    layer = model()
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        return 1.5

    assert Joined(parts_of(layer)).step(closure) == 1.5 and calls == [1]
