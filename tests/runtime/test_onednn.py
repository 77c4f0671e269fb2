"""oneDNN's products are the products, forward and backward, and nothing else of a layer changes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from truthgpt.runtime import onednn
from truthgpt.runtime.onednn import is_faster, linear, matmul, multiply_by_onednn, pack

pytestmark = pytest.mark.usefixtures("on_amd")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    assert found is not None and exact is not None
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 70), bias=st.booleans())
def test_products_are_those_of_float64(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    x, weight, added = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    exact = x.double() @ weight.double().t() + (added.double() if bias else 0)
    for each in (weight, pack(weight)):
        close(linear(x, each, added if bias else None), exact)
        close(linear(x[None], each, added if bias else None)[0], exact)
    close(matmul(x, weight.t()), x.double() @ weight.double().t())
    close(matmul(x.t().contiguous().t(), weight.t()), x.double() @ weight.double().t())


def layer_of(kind: type[nn.Module], bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias) if kind is nn.Linear else Conv1D(40, 24)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias"), ("input",)])
@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_gradients_are_those_of_float64(kind: type[nn.Module], bias: bool, frozen: tuple[str, ...]) -> None:
    layer = layer_of(kind, bias)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    exact = copy.deepcopy(layer).double()
    multiply_by_onednn(layer)
    x, upstream = random(3, 5, 24), random(3, 5, 40, seed=1)
    found_x, exact_x = x.clone().requires_grad_("input" not in frozen), x.double().requires_grad_()
    output = layer(found_x)
    assert output.grad_fn is not None and type(output.grad_fn).__name__ == "_LinearBackward"
    output.backward(upstream)
    exact(exact_x).backward(upstream.double())
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            close(parameter.grad, exact.get_parameter(name).grad)
    if "input" not in frozen:
        close(found_x.grad, exact_x.grad)


def test_gradients_of_gradients_are_refused() -> None:
    layer = layer_of(nn.Linear)
    multiply_by_onednn(layer)
    x = random(2, 24).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_names_stay_and_a_copy_has_its_own_weights() -> None:
    model = nn.Sequential(layer_of(nn.Linear), nn.ReLU())
    keys = list(model.state_dict())
    multiply_by_onednn(model)
    twin = copy.deepcopy(model)
    assert list(model.state_dict()) == list(twin.state_dict()) == keys
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    assert not twin(random(2, 24)).any() and model(random(2, 24)).any()


def test_a_layer_that_became_another_type_computes_in_it() -> None:
    layer = layer_of(nn.Linear)
    multiply_by_onednn(layer)
    x = random(3, 24)
    wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert torch.equal(layer.double()(x.double()), wanted)


def test_layers_that_derive_from_linear_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layer = Doubled(24, 40)
    multiply_by_onednn(layer)
    assert type(layer) is Doubled


def test_only_float32_is_multiplied_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_faster()

    def refuse(*arguments: Any) -> torch.Tensor:
        raise AssertionError(arguments)

    monkeypatch.setattr(onednn, "linear", refuse)
    for dtype in (torch.float64, torch.bfloat16):
        x, y = random(3, 4).to(dtype), random(4, 5).to(dtype)
        assert torch.equal(matmul(x, y), x @ y)


class TestWhereItIsNotFaster:
    def check_nothing_changes(self) -> None:
        is_faster.cache_clear()
        layer = layer_of(nn.Linear)
        multiply_by_onednn(layer)
        assert not is_faster() and type(layer) is nn.Linear
        x, y = random(3, 4), random(4, 5)
        assert torch.equal(matmul(x, y), x @ y)

    def test_another_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onednn, "is_amd_processor", lambda: False)
        self.check_nothing_changes()

    @pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
    def test_a_torch_without_the_operators(self, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
        def missing(*arguments: Any) -> torch.Tensor:
            raise error("no such operator")

        monkeypatch.setattr(onednn, "linear", missing)
        self.check_nothing_changes()

    def test_a_torch_whose_operators_do_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onednn, "pack", lambda weight: 2 * weight)
        self.check_nothing_changes()


def test_asked_first_where_tensors_have_no_storage() -> None:
    with FakeTensorMode():
        assert is_faster()
        assert matmul(torch.empty(3, 4), torch.empty(4, 5)).shape == (3, 5)


def test_the_input_of_a_frozen_layer_is_not_kept() -> None:
    """As with PyTorch's own: the memory plan counts on it."""
    x = random(7, 24).requires_grad_()
    kept: dict[bool, list[torch.Size]] = {}
    for by_onednn in (False, True):
        layer = layer_of(nn.Linear)
        layer.requires_grad_(False)
        if by_onednn:
            multiply_by_onednn(layer)
        saved: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape), lambda t: t):
            layer(x)
        kept[by_onednn] = saved
    assert len(kept[True]) == len(kept[False]) == 1 and torch.Size([7, 24]) not in kept[True]


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    layer = layer_of(nn.Linear)
    multiply_by_onednn(layer)
    x = torch.empty(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert matmul(torch.empty(3, 0), torch.empty(0, 4)).eq(0).all()


def test_autocast_is_heeded() -> None:
    layer = layer_of(nn.Linear)
    multiply_by_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(random(3, 24)).dtype == torch.bfloat16


def test_a_model_that_is_dropped_is_gone() -> None:
    layer = layer_of(nn.Linear)
    multiply_by_onednn(layer)
    weight = weakref.ref(layer.weight)
    gc.disable()
    try:
        del layer
        assert weight() is None, "a cycle holds it"
    finally:
        gc.enable()
