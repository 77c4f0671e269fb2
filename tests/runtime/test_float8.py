"""float8 products: what stands in their way is said, and which layers they would be of. Their numbers: tests/gpu."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.test_build import build
from torch import nn

import truthgpt.build
from truthgpt.errors import ConfigError
from truthgpt.runtime.float8 import float8_obstacle, multiply_in_float8

CUDA = torch.device("cuda")
LLAMA = (
    "model.config={model_type: llama, hidden_size: 32, intermediate_size: 72, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}"
)
FLOAT8 = (LLAMA, "training.mixed_precision=bf16", "training.float8=tensorwise")


class FakeTorchao:
    """torchao.float8 as far as it is used; converted layers are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipes: list[str] = []
        self.converted: list[str] = []
        module = ModuleType("torchao.float8")
        module.Float8LinearConfig = type(  # type: ignore[attr-defined]
            "Float8LinearConfig", (), {"from_recipe_name": staticmethod(self.recipes.append)}
        )
        module.convert_to_float8_training = self.convert  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.float8", module)

    def convert(self, layer: nn.Module, *, module_filter_fn: Callable[[nn.Module, str], bool], config: Any) -> None:
        self.converted += [name for name, module in layer.named_modules() if module_filter_fn(module, name)]


@pytest.mark.parametrize(
    ("device", "capability", "installed", "words"),
    [
        (torch.device("cpu"), None, True, "need a CUDA GPU, this run is on cpu"),
        (CUDA, (8, 6), True, "need compute capability 8.9, this GPU has 8.6"),
        (CUDA, (9, 0), False, r"pip install 'truthgpt[torchao]'"),
        (CUDA, (8, 9), True, None),
    ],
)
def test_obstacles(
    device: torch.device,
    capability: tuple[int, int],
    installed: bool,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeTorchao(monkeypatch)
    if not installed:
        monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = float8_obstacle(device)
    assert found is None if words is None else words in str(found)


def test_linear_layers_of_sizes_that_fit_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = FakeTorchao(monkeypatch)
    layer = nn.ModuleDict({"fits": nn.Linear(32, 48), "odd": nn.Linear(32, 40), "norm": nn.LayerNorm(32)})
    assert multiply_in_float8([layer, layer], "rowwise") == 2
    assert torchao.converted == ["fits", "fits"] and torchao.recipes == ["rowwise"]


def test_a_cpu_computes_in_bf16_and_says_so(tmp_path: Path) -> None:
    taken = build(tmp_path, *FLOAT8).fallbacks.to_json()
    (fallback,) = [each for each in taken if each["part"] == "training.float8"]
    assert fallback["wanted"] == "tensorwise" and fallback["used"] == "none" and "cpu" in fallback["reason"]
    with pytest.raises(ConfigError, match=r"training\.float8"):
        build(tmp_path, *FLOAT8, "training.mixed_precision=bf16", "strict=true")


def test_layers_that_are_not_compiled_keep_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = FakeTorchao(monkeypatch)
    monkeypatch.setattr(truthgpt.build, "float8_obstacle", lambda device: None)
    monkeypatch.setattr(truthgpt.build, "compile_layers", lambda *_: True)
    monkeypatch.setattr(truthgpt.runtime.precision, "has_native_bf16", lambda device: True)
    taken = build(tmp_path, *FLOAT8, "training.torch_compile=false").fallbacks.to_json()
    assert [each["part"] for each in taken] == ["training.float8"] and "not compiled" in taken[0]["reason"]
    assert not torchao.converted
    assert build(tmp_path, *FLOAT8, "training.torch_compile=true").fallbacks.to_json() == []
    assert len(torchao.converted) == 2 * 4, "the attention's; 72 is no multiple of 16"
