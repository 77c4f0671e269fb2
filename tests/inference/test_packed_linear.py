"""Packed weights: the same logits inside, the same layers afterwards."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.inference.engine_runs import answers, opened, reference
from tests.inference.small_models import CONFIGS, EOS, small_model
from torch import nn

from truthgpt.inference import packed_linear
from truthgpt.inference.packed_linear import packed_linears
from truthgpt.runtime import onednn
from truthgpt.runtime.onednn import is_faster, linear_layers, multiply_by_onednn

pytestmark = pytest.mark.usefixtures("on_amd")
IDS = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_same_logits_and_the_same_layers_afterwards(kind: str) -> None:
    model = small_model(kind).eval()
    exact = logits(small_model(kind).eval().double())
    layers = linear_layers(model)
    before = logits(model)
    with packed_linears(model):
        assert layers and all("forward" in vars(layer) for layer in layers)
        found = logits(model)
    assert float((found - exact).abs().max()) < 2 * max(float((before - exact).abs().max()), 1e-5)
    assert not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_engine_on_a_cpu_writes_with_them(kind: str) -> None:
    model = small_model(kind)
    prompts = [(5, 7), (1,), tuple(range(40, 59))]
    with opened(model) as engine:
        assert all("forward" in vars(layer) for layer in linear_layers(model))
        assert answers(engine, prompts) == [reference(kind, prompt) for prompt in prompts]


def test_weights_are_read_anew_each_time() -> None:
    model = small_model("llama")
    with packed_linears(model):
        first = logits(model)
    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.mul_(0.5)
    wanted = logits(model)
    with packed_linears(model):
        assert torch.allclose(logits(model), wanted, atol=1e-4) and not torch.allclose(first, wanted, atol=1e-2)


def test_layers_in_training_go_on_as_they_were() -> None:
    model = small_model("gpt2")
    multiply_by_onednn(model)
    with pytest.raises(KeyboardInterrupt), packed_linears(model):
        assert all("forward" in vars(layer) for layer in linear_layers(model))
        raise KeyboardInterrupt
    assert linear_layers(model) and not any("forward" in vars(layer) for layer in linear_layers(model))


def test_a_copy_that_fails_leaves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, left = small_model("llama"), [3]

    def pack_some(weight: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")
        return onednn.pack(weight)

    monkeypatch.setattr(packed_linear, "pack", pack_some)
    with pytest.raises(RuntimeError, match="out of memory"), packed_linears(model):
        raise AssertionError("opened")
    assert not any("forward" in vars(layer) for layer in linear_layers(model))


def test_too_little_memory_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("llama")
    monkeypatch.setattr(packed_linear, "free_memory_bytes", lambda device: 1000)
    with caplog.at_level(logging.INFO), packed_linears(model):
        assert not any("forward" in vars(layer) for layer in linear_layers(model))
    assert [record.getMessage() for record in caplog.records] == [
        f"no packed copy of the weights for faster products: it takes "
        f"{sum(layer.weight.nbytes for layer in linear_layers(model))} bytes of 1000 free"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_stay_as_they_are(dtype: torch.dtype) -> None:
    model = small_model("llama").to(dtype)
    with packed_linears(model):
        assert not any("forward" in vars(layer) for layer in linear_layers(model))


def test_another_processor_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_amd_processor", lambda: False)
    is_faster.cache_clear()
    model = small_model("llama")
    with packed_linears(model):
        assert not any("forward" in vars(layer) for layer in linear_layers(model))
