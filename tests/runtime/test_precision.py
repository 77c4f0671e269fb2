"""Precision: what is chosen where, and steps that are skipped without being read back from the device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from truthgpt.errors import ConfigError
from truthgpt.optim.lion import Lion
from truthgpt.runtime import precision as precision_module
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.precision import (
    OptimizerStep,
    Precision,
    ScaledPrecision,
    UnscaledPrecision,
    choose_precision,
    has_native_bf16,
    hold_frozen_in_bf16,
    in_float32,
)

torch.set_num_threads(1)

CPU = torch.device("cpu")
RUN, SKIP = torch.zeros(()), torch.ones(())
OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=False),
    "lion": lambda parameters: Lion(parameters, lr=0.1, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1, weight_decay=0.1),
}
ON_DEVICE = ["fused adamw", "lion"]


class NoReadback(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails when a tensor's value is read by the host, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read back from the device")
        return func(*args, **(kwargs or {}))


def no_readback() -> AbstractContextManager[Any]:
    return NoReadback()  # type: ignore[no-untyped-call]


def new_parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(4, 3), (5,)]]


def set_gradients(parameters: list[torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def poison(parameters: list[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))


def everything(parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """All parameters and all optimizer state as bytes."""
    found = {f"p{i}": parameter.detach().numpy().tobytes() for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state[parameter].items():
            found[f"{key}{i}"] = value.numpy().tobytes()
    return found


def test_readback_detector_works() -> None:
    with no_readback(), pytest.raises(AssertionError, match="read back"):
        bool(torch.ones(()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_leaves_every_bit_then_training_goes_on_as_if_nothing_happened(name: str) -> None:
    parameters, untouched = new_parameters(), new_parameters()
    optimizer, control = OPTIMIZERS[name](parameters), OPTIMIZERS[name](untouched)
    precision = UnscaledPrecision("none", CPU, None)
    for step in range(6):
        set_gradients(parameters, step)
        precision.step(optimizer, RUN)
        before = everything(parameters, optimizer)
        assert len(before) > len(parameters), "there is optimizer state to compare"
        poison(parameters)
        precision.step(optimizer, SKIP)
        assert everything(parameters, optimizer) == before
        set_gradients(untouched, step)
        control.step()
    assert everything(parameters, optimizer) == everything(untouched, control)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_at_the_very_first_step(name: str) -> None:
    parameters, untouched = new_parameters(), new_parameters()
    optimizer, control = OPTIMIZERS[name](parameters), OPTIMIZERS[name](untouched)
    step = OptimizerStep()
    poison(parameters)
    step(optimizer, SKIP)
    for trained, tested in ((parameters, optimizer), (untouched, control)):
        set_gradients(trained, 1)
        step(tested, RUN)
    assert everything(parameters, optimizer) == everything(untouched, control)


@pytest.mark.parametrize("name", ON_DEVICE)
@pytest.mark.parametrize("precision", [UnscaledPrecision("none", CPU, None), ScaledPrecision(CPU)])
def test_no_value_is_read_back(name: str, precision: Precision) -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS[name](parameters)
    for skip in (RUN, SKIP, RUN):
        set_gradients(parameters, 0)
        with no_readback():
            loss = precision.scale(torch.ones(()))
            precision.unscale(optimizer)
            precision.step(optimizer, skip)
        assert loss.isfinite()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_other_optimizers_are_read_back_and_that_is_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS[name](parameters)
    step = OptimizerStep()
    with caplog.at_level(logging.INFO, logger="truthgpt"):
        for seed in range(3):
            set_gradients(parameters, seed)
            step(optimizer, RUN)
    assert [record.getMessage().split()[0] for record in caplog.records] == [type(optimizer).__name__]
    with no_readback(), pytest.raises(AssertionError, match="read back"):
        step(optimizer, SKIP)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_nothing_stays_on_the_optimizer(name: str) -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS[name](parameters)
    set_gradients(parameters, 0)
    OptimizerStep()(optimizer, SKIP)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    before = everything(parameters, optimizer)
    optimizer.step()
    assert everything(parameters, optimizer) != before

    def fail() -> None:
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(lambda *_: fail())
    with pytest.raises(KeyboardInterrupt):
        OptimizerStep()(optimizer, SKIP)
    assert not hasattr(optimizer, "found_inf")


def test_unscaled_keeps_no_state() -> None:
    plain = UnscaledPrecision("none", CPU, None)
    loss = torch.tensor(3.0)
    assert plain.scale(loss) is loss
    assert isinstance(plain.autocast(), nullcontext)
    assert plain.state_dict() == {}
    plain.load_state_dict({})
    weight = torch.ones(2, 2)
    with UnscaledPrecision("bf16", CPU, torch.bfloat16).autocast():
        assert (weight @ weight).dtype == torch.bfloat16
    with plain.autocast():
        assert (weight @ weight).dtype == torch.float32


def test_scaled_matches_unscaled_where_nothing_overflows() -> None:
    """A power of two scales without rounding, so even the bits agree."""
    plain, scaled = new_parameters(), new_parameters()
    plain_optimizer, scaled_optimizer = OPTIMIZERS["fused adamw"](plain), OPTIMIZERS["fused adamw"](scaled)
    precision = ScaledPrecision(CPU, growth_interval=3)
    for step in range(8):
        set_gradients(plain, step)
        plain_optimizer.step()
        for parameter in scaled:
            parameter.grad = None
        generator = torch.Generator().manual_seed(step)
        loss = torch.stack([(p * torch.randn(p.shape, generator=generator)).sum() for p in scaled]).sum()
        torch.autograd.backward(precision.scale(loss))
        precision.unscale(scaled_optimizer)
        precision.step(scaled_optimizer, RUN)
    assert everything(plain, plain_optimizer) == everything(scaled, scaled_optimizer)
    assert precision.state_dict() == {"scale": 65536.0 * 4, "growth_tracker": 2}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_skips_and_backs_off_as_grad_scaler_does(name: str) -> None:
    """torch.amp.GradScaler over the same gradients, overflows among them, is the reference."""
    ours, theirs = new_parameters(), new_parameters()
    our_optimizer, their_optimizer = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    precision = ScaledPrecision(CPU, initial_scale=1024.0, growth_interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step, overflow in enumerate([False, True, True, False, False, False, True, False]):
        for parameters, scale in ((ours, precision.scale(torch.ones(()))), (theirs, scaler.scale(torch.ones(())))):
            set_gradients(parameters, step)
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad *= scale
            if overflow:
                assert parameters[1].grad is not None
                parameters[1].grad[2] = float("inf")
        precision.unscale(our_optimizer)
        precision.step(our_optimizer, RUN)
        scaler.unscale_(their_optimizer)
        scaler.step(their_optimizer)
        scaler.update()
        assert precision.state_dict()["scale"] == scaler.get_scale()
        assert everything(ours, our_optimizer) == everything(theirs, their_optimizer)


def test_the_guard_can_skip_a_step_that_did_not_overflow() -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS["fused adamw"](parameters)
    precision = ScaledPrecision(CPU)
    before = [parameter.detach().clone() for parameter in parameters]
    set_gradients(parameters, 0)
    precision.unscale(optimizer)
    precision.step(optimizer, SKIP)
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert precision.state_dict() == {"scale": 65536.0, "growth_tracker": 1}, "the scale is not to blame"


def test_unscale_exactly_once_a_step() -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS["lion"](parameters)
    precision = ScaledPrecision(CPU)
    with pytest.raises(RuntimeError, match="before step"):
        precision.step(optimizer, RUN)
    set_gradients(parameters, 0)
    precision.unscale(optimizer)
    with pytest.raises(RuntimeError, match="twice"):
        precision.unscale(optimizer)
    precision.step(optimizer, RUN)
    precision.unscale(optimizer)


def test_scaler_state_round_trip(caplog: pytest.LogCaptureFixture) -> None:
    parameters = new_parameters()
    optimizer = OPTIMIZERS["lion"](parameters)
    first = ScaledPrecision(CPU, growth_interval=5)
    for step in range(7):
        set_gradients(parameters, step)
        first.unscale(optimizer)
        first.step(optimizer, RUN)
    state = copy.deepcopy(first.state_dict())
    assert state == {"scale": 131072.0, "growth_tracker": 2}
    assert {type(value) for value in state.values()} == {float, int}
    second = ScaledPrecision(CPU, growth_interval=5)
    second.load_state_dict(state)
    assert second.state_dict() == state
    with caplog.at_level(logging.INFO, logger="truthgpt"):
        second.load_state_dict({})
    assert second.state_dict() == state
    assert "no loss scale" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "kind", "native", "used"),
    [
        ("bf16", "cuda", True, "bf16"),
        ("bf16", "cuda", False, "fp16"),
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "cpu", False, "none"),
        ("bf16", "mps", False, "none"),
        ("fp16", "cuda", True, "fp16"),
        ("fp16", "cpu", True, "none"),
        ("fp16", "mps", False, "none"),
        ("none", "cuda", True, "none"),
        ("none", "cpu", False, "none"),
    ],
)
def test_choice_and_fallback(
    wanted: str, kind: str, native: bool, used: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision_module, "has_native_bf16", lambda device: native)
    # The scaler's tensors need a device that is here; the choice does not.
    monkeypatch.setattr(precision_module, "ScaledPrecision", lambda device: ScaledPrecision(CPU))
    fallbacks = Fallbacks()
    precision = choose_precision(wanted, torch.device(kind), fallbacks)
    assert precision.name == used
    assert isinstance(precision, ScaledPrecision) == (used == "fp16")
    taken = fallbacks.to_json()
    assert [(f["part"], f["wanted"], f["used"]) for f in taken] == (
        [] if wanted == used else [("training.mixed_precision", wanted, used)]
    )
    assert len(caplog.records) == len(taken)
    if wanted != used:
        with pytest.raises(ConfigError, match=r"training\.mixed_precision"):
            choose_precision(wanted, torch.device(kind), Fallbacks(strict=True))


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_a_processor_must_have_the_instructions(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_native_bf16(CPU) is native


def test_the_real_probe_answers() -> None:
    assert has_native_bf16(CPU) in (True, False)
    assert has_native_bf16(torch.device("mps")) is False


class Stack(nn.Module):
    """An embedding, layers, and a head tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits: torch.Tensor = self.head(x)
        return logits


def test_half_precision_weights_compute_in_float32_layer_by_layer() -> None:
    torch.manual_seed(0)
    model, ids = Stack(), torch.arange(16)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    exact = copy.deepcopy(model).float()
    before = {name: (p, p.data.clone()) for name, p in model.named_parameters()}
    wide: list[int] = []

    def count(*_: Any) -> None:
        wide.append(sum(p.dtype == torch.float32 for p in model.layers.parameters()))

    with in_float32(model):
        for layer in model.layers:
            layer.register_forward_pre_hook(count)
        logits = model(ids)
        assert logits.dtype == torch.float32 and torch.equal(logits, exact(ids))
    assert wide == [2] * 4, "one weight and one bias at a time"
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter.data, before[name][1]), name
        assert parameter.dtype == torch.bfloat16
    assert model(ids).dtype == torch.bfloat16


def test_weights_come_back_after_an_error() -> None:
    model = Stack().bfloat16()
    with pytest.raises(RuntimeError), in_float32(model):
        with pytest.raises(RuntimeError):
            model.layers[1](torch.ones(3, 5))  # a layer that fails
        assert model.layers[1].weight.dtype == torch.bfloat16
        model(torch.ones(3))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_float32_weights_are_left_alone() -> None:
    model = Stack()
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    with in_float32(model):
        model(torch.arange(16))
        assert [parameter.data_ptr() for parameter in model.parameters()] == weights


def test_frozen_weights_in_bf16() -> None:
    model = Stack()
    model.embedding.requires_grad_(False)
    model.register_buffer("angles", torch.ones(3))
    precision = hold_frozen_in_bf16(model)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {"embedding.weight"}
    assert model.angles.dtype == torch.float32
    assert precision.name == "bf16"
    with precision.autocast():
        assert not torch.is_autocast_enabled("cpu")
