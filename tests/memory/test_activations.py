"""What is counted without storage is what autograd keeps on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention.packed_models import COMMON, FAMILIES, model_of
from torch import Tensor
from transformers import PreTrainedModel

from truthgpt.attention.install import install_attention
from truthgpt.attention.sdpa import sdpa_attention
from truthgpt.memory.activations import Activations, fake_model, measure_activations
from truthgpt.models.causal_lm import build_causal_lm
from truthgpt.models.output_head import last_hidden_states
from truthgpt.runtime.compile import decoder_layers

LENGTH = 24
NO_DROPOUT = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": FAMILIES["llama"],
    "gpt2": {**FAMILIES["gpt2"], **NO_DROPOUT},
    # Full attention everywhere: on a CPU a sliding window takes a mask, which no GPU kernel of ours does.
    "qwen3": {"model_type": "qwen3", **COMMON},
}


def counted(family: str, compiled: bool = False, half: bool = False) -> Activations:
    config = model_of(SHAPES[family], "sdpa").config
    mode, model = fake_model(lambda: build_causal_lm(config, "sdpa", 0))
    return measure_activations(mode, model, LENGTH, half_precision=half, compiled=compiled)


def kept(model: PreTrainedModel, rows: int, half: bool = False) -> int:
    """Bytes of all storages that autograd saves in a real forward pass, weights and buffers left out."""
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor
        return tensor

    ids = torch.zeros((rows, LENGTH), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = last_hidden_states(model.train(), input_ids=ids)
        assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def with_our_attention(family: str) -> PreTrainedModel:
    model = model_of(SHAPES[family], "sdpa")
    model.set_attn_implementation(install_attention("sdpa", sdpa_attention))
    return model


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", SHAPES)
def test_count_is_what_autograd_keeps(family: str, rows: int) -> None:
    found, model = counted(family), with_our_attention(family)
    layers = len(decoder_layers(model))
    predicted = found.outside + rows * found.outside_row + layers * (found.layer + rows * found.layer_row)
    assert predicted == pytest.approx(kept(model, rows), rel=0.01)


def test_casts_of_autocast_do_not_grow_with_the_rows() -> None:
    model = with_our_attention("llama")
    found, layer = counted("llama", half=True), decoder_layers(model)[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert found.layer == pytest.approx(2 * matrices, rel=0.05), "a bf16 copy of every matrix"
    layers = len(decoder_layers(model))
    predicted = found.outside + 2 * found.outside_row + layers * (found.layer + 2 * found.layer_row)
    assert predicted == pytest.approx(kept(model, 2, half=True), rel=0.02)


def test_compiled_layers_keep_less() -> None:
    torch._dynamo.reset()  # what other tests compiled of the same layers counts towards its limit
    eager, compiled = counted("llama"), counted("llama", compiled=True)
    assert compiled.layer_row < 0.9 * eager.layer_row and compiled.layer_input_row == eager.layer_input_row
    model = with_our_attention("llama")

    def probe() -> None:
        last_hidden_states(model, input_ids=torch.zeros((2, LENGTH), dtype=torch.long)).sum().backward()

    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager_decomp_partition", dynamic=False)
    probe()
    predicted = 2 * compiled.outside_row + len(decoder_layers(model)) * (compiled.layer + 2 * compiled.layer_row)
    assert predicted == pytest.approx(kept(model, 2), rel=0.02)
    torch._dynamo.reset()


def test_input_of_a_layer_is_what_checkpointing_keeps() -> None:
    model = with_our_attention("llama")
    assert counted("llama").layer_input_row == 4 * LENGTH * model.config.hidden_size


def test_nothing_is_allocated_and_nothing_stays() -> None:
    """A model of 70 billion weights is counted in a process of a few hundred megabytes."""
    config = model_of(SHAPES["llama"], "sdpa").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    mode, model = fake_model(lambda: build_causal_lm(config, "sdpa", 0))
    assert sum(p.numel() for p in model.parameters()) > 65e9
    found = measure_activations(mode, model, 4096, half_precision=True, compiled=False)
    assert found.layer_row > 4096 * 8192 * 2 * 10
    assert model.config._attn_implementation == "sdpa"
    assert len(decoder_layers(model)) == 80
