"""Compiled layers in a real run: one graph for all layers of a kind, and nothing compiled again after the build."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.compiled_graphs import count_graphs_after_the_plan
from tests.sample_data import write_sources
from tests.test_build import build_small_trainer

COMMON = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 2, num_key_value_heads: 1"
GPT2 = "n_embd: 32, n_layer: 4, n_head: 2, n_positions: 64, resid_pdrop: 0.1, attn_pdrop: 0.0"
KINDS = "layer_types: [sliding_attention, full_attention, sliding_attention, full_attention], sliding_window: 8"
FAMILIES = {
    "gpt2": (f"{{model_type: gpt2, {GPT2}}}", 1),
    "llama": (f"{{model_type: llama, {COMMON}}}", 1),
    "qwen3": (f"{{model_type: qwen3, {COMMON}, head_dim: 16}}", 1),
    "gemma3": (f"{{model_type: gemma3_text, {COMMON}, head_dim: 16, {KINDS}}}", 2),
}
"""Each with its number of graphs: one for every kind of layer."""
DATA = {
    "joined": (),
    "packed": ("data.source=jsonl", "data.path=rows.jsonl", "data.packing=true"),
}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile as it is, with a backend that takes no seconds."""
    compile_module = nn.Module.compile

    def quickly(self: nn.Module, *, mode: str = "default", backend: str = "aot_eager", **keywords: Any) -> None:
        compile_module(self, backend=backend, **keywords)

    monkeypatch.setattr(nn.Module, "compile", quickly)
    count_graphs_after_the_plan(monkeypatch)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "weights"), [*((name, "float32") for name in FAMILIES), ("llama", "bf16_master")])
@pytest.mark.parametrize("data", DATA)
def test_one_graph_a_kind_of_layer_and_none_after_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, data: str, weights: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    model, kinds = FAMILIES[family]
    trainer = build_small_trainer(
        tmp_path, *DATA[data], f"model.config={model}", "training.torch_compile=true", "training.mixed_precision=bf16",
        f"training.weights={weights}", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] == kinds
    for step, batch in enumerate(islice(trainer.parts.loader.batches(), 5)):
        trainer.parts.engine.train_step(batch, step)
    assert counters["stats"]["unique_graphs"] == kinds, "compiled again while training"
    assert not counters["graph_break"]
