"""The average of the weights: swapped in and out without a trace, saved, and absent where it is off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from truthgpt.trainers.ema import EMA, KeepsAverage, NoEMA, OptimizerAverage


def moved(model: nn.Module, ema: EMA, steps: int) -> None:
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(step)


def test_applied_swaps_and_restores_every_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = EMA(model, 0.9)
    moved(model, ema, 5)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    assert not torch.equal(raw["0.weight"], average["0.weight"])
    with ema.applied():
        assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, raw[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in ema.state_dict().items())


def test_applied_restores_after_an_error() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    moved(model, ema, 3)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert torch.equal(model.weight, before)


def test_optimizer_still_updates_the_model_after_a_swap() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = EMA(model, 0.9)
    with ema.applied():
        pass
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before - 1)


def test_first_update_is_nearly_the_weights() -> None:
    """Decay (1 + 1) / (10 + 1) at step 1: a random start does not linger."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = EMA(model, 0.999)
    model.weight.data.fill_(1.0)
    ema.update(1)
    assert ema.state_dict()["weight"].item() == pytest.approx(9 / 11)


def test_bf16_weights_have_a_float32_average() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, 0.9)
    moved(model, ema, 3)
    assert {value.dtype for value in ema.state_dict().values()} == {torch.float32}
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.dtype == torch.bfloat16


def test_frozen_weights_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert EMA(model, 0.9).state_dict().keys() == {"weight"}


def test_state_round_trip_and_missing_name() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    moved(model, ema, 3)
    saved = {name: value.clone() for name, value in ema.state_dict().items()}
    other = EMA(nn.Linear(2, 2), 0.9)
    other.load_state_dict(saved)
    assert all(torch.equal(other.state_dict()[name], saved[name]) for name in saved)
    with pytest.raises(KeyError, match="bias"):
        other.load_state_dict({"weight": saved["weight"]})


class Doubler(torch.optim.SGD):
    """Its average of a weight is twice the weight."""

    def averaged(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach() * 2


def test_the_optimizers_average_is_exchanged_for_the_weights() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = Doubler([model.weight], lr=1.0)
    assert isinstance(optimizer, KeepsAverage) and not isinstance(torch.optim.SGD([model.weight]), KeepsAverage)
    average = OptimizerAverage(model, optimizer)
    average.update(1)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert torch.equal(model.weight, weight * 2) and torch.equal(model.bias, bias)
        raise RuntimeError("inside")
    assert torch.equal(model.weight, weight)
    assert average.state_dict().keys() == {"weight"}
    assert torch.equal(average.state_dict()["weight"], weight * 2)
    average.load_state_dict({"weight": weight * 9})
    assert torch.equal(average.state_dict()["weight"], weight * 2), "made of the weights"
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, weight), "and those are still the optimizer's"


def test_no_average_does_nothing() -> None:
    none = NoEMA()
    none.update(1)
    with none.applied():
        pass
    none.load_state_dict({"weight": torch.zeros(1)})
    assert none.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_elsewhere_is_the_same(dtype: torch.dtype) -> None:
    """Kept on another device (which on a CPU is the same one, by copies): equal average, weights back bit for bit."""
    models = [nn.Linear(3, 2).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [EMA(models[0], 0.9), EMA(models[1], 0.9, device=torch.device("cpu"))]
    for model, average in zip(models, averages, strict=True):
        torch.manual_seed(0)
        moved(model, average, 4)
    assert all(torch.equal(value, averages[1].state_dict()[name]) for name, value in averages[0].state_dict().items())
    before, storage = models[1].weight.detach().clone(), models[1].weight.data_ptr()
    with averages[0].applied(), averages[1].applied():
        assert torch.equal(models[1].weight, models[0].weight) and not torch.equal(models[1].weight, before)
        assert models[1].weight.data_ptr() == storage, "copied into the weights, not beside them"
    assert torch.equal(models[1].weight, before) and models[1].weight.data_ptr() == storage
