"""Compiling layer by layer: when it pays, that nothing else changes, and eager with one line where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from truthgpt.errors import ConfigError
from truthgpt.runtime.compile import (
    BREAK_EVEN_S,
    can_replay,
    compile_layers,
    compile_pays,
    decoder_layers,
    estimated_run_s,
)
from truthgpt.runtime.fallbacks import Fallbacks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Layer(nn.Module):
    """A linear layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x


class Model(nn.Module):
    """Three equal layers, and a shorter list beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.heads[0](x)


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile with a backend that needs no compiler, and what it was asked for."""
    asked: list[dict[str, Any]] = []
    compile_module = nn.Module.compile

    def compile_quickly(self: nn.Module, *, mode: str, **keywords: Any) -> None:
        asked.append({"mode": mode, **keywords})
        compile_module(self, backend="aot_eager", **keywords)

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    torch._dynamo.reset()
    return asked


def probe_of(model: nn.Module) -> Callable[[], None]:
    def probe() -> None:
        model(torch.ones(2, 4)).sum().backward()
        model.zero_grad(set_to_none=True)

    return probe


@pytest.mark.parametrize(
    ("wanted", "device", "eager_run_s", "pays"),
    [
        (True, CPU, 0.1, True),
        (False, CUDA, 1e9, False),
        ("auto", CPU, 1e9, False),
        ("auto", CUDA, BREAK_EVEN_S - 1, False),
        ("auto", CUDA, BREAK_EVEN_S, True),
    ],
)
def test_when_it_pays(wanted: Any, device: torch.device, eager_run_s: float, pays: bool) -> None:
    assert compile_pays(wanted, device, eager_run_s) is pays


def test_a_run_is_as_long_as_its_arithmetic() -> None:
    """GPT-2 124M at 0.8 GFLOP a token and 30% of an H200's peak: about 370k tokens a second."""
    assert estimated_run_s(0.8e9 * 370_000 * 60, 989e12) == pytest.approx(60, rel=0.01)
    assert estimated_run_s(1.0, None) > estimated_run_s(1.0, 989e12), "an unknown GPU is taken for a slower one"


@pytest.mark.parametrize(
    ("device", "fixed", "anomaly", "reason"),
    [
        (CUDA, True, False, None),
        (CPU, True, False, "need a CUDA GPU, this run is on cpu"),
        (CUDA, False, False, "these batches have many; data.packing gives them one"),
        (CUDA, True, True, "detect_anomaly"),
    ],
)
def test_what_can_be_replayed(device: torch.device, fixed: bool, anomaly: bool, reason: str | None) -> None:
    fallbacks = Fallbacks()
    assert can_replay(device, fixed, anomaly, fallbacks) is (reason is None)
    said = [fallback["reason"] for fallback in fallbacks.to_json()]
    assert (said == []) if reason is None else (reason in said[0])


def test_layers_are_the_longest_list_of_equals() -> None:
    model = Model()
    assert decoder_layers(model) == list(model.layers)
    assert decoder_layers(nn.Linear(2, 2)) == []
    assert decoder_layers(nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])})) == []


@pytest.mark.parametrize("fixed", [True, False])
def test_compiled_in_place(quick_backend: list[dict[str, Any]], fixed: bool) -> None:
    torch.manual_seed(0)
    model, fallbacks = Model(), Fallbacks()
    keys, expected = list(model.state_dict()), model(torch.ones(2, 4))
    assert compile_layers(model, "max-autotune", fixed, probe_of(model), fallbacks)
    assert fallbacks.to_json() == [] and list(model.state_dict()) == keys
    assert quick_backend == [{"mode": "max-autotune", "fullgraph": True, "dynamic": False if fixed else None}] * 3
    assert all(layer._compiled_call_impl is not None for layer in model.layers)
    assert torch.allclose(model(torch.ones(2, 4)), expected, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_graph_break_is_tried_again_without_a_full_graph(quick_backend: list[dict[str, Any]]) -> None:
    model, fallbacks = Model(), Fallbacks()
    first = Layer.forward

    def broken(self: Layer, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return first(self, x)

    for layer in model.layers:
        layer.forward = broken.__get__(layer)
    assert compile_layers(model, "default", True, probe_of(model), fallbacks)
    assert fallbacks.to_json() == []
    assert [asked["fullgraph"] for asked in quick_backend] == [True] * 3 + [False] * 3
    model(torch.ones(2, 4))


@pytest.mark.parametrize("error", [Unsupported("cannot trace this\nlong story"), RuntimeError("no compiler found")])
def test_what_cannot_be_compiled_stays_eager(quick_backend: list[dict[str, Any]], error: Exception) -> None:
    model, fallbacks = Model(), Fallbacks()

    def probe() -> None:
        raise error

    assert not compile_layers(model, "default", True, probe, fallbacks)
    (fallback,) = fallbacks.to_json()
    assert fallback["used"] == "eager" and "\n" not in fallback["reason"]
    assert fallback["reason"] in str(error)
    assert all(layer._compiled_call_impl is None for layer in model.layers)
    assert model(torch.ones(2, 4)).shape == (2, 2)
    with pytest.raises(ConfigError, match="strict"):
        compile_layers(model, "default", True, probe, Fallbacks(strict=True))


def test_out_of_memory_is_no_reason_to_go_on(quick_backend: list[dict[str, Any]]) -> None:
    def probe() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_layers(Model(), "default", True, probe, Fallbacks())


def test_model_without_layers_stays_eager() -> None:
    fallbacks = Fallbacks()
    assert not compile_layers(nn.Linear(2, 2), "default", True, lambda: None, fallbacks)
    assert [f["reason"] for f in fallbacks.to_json()] == ["the model has no list of equal layers"]
