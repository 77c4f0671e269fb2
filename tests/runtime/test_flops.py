"""FLOPs a token counted by hand and by torch's own counter, and the peaks of known GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from truthgpt.runtime.flops import peak_flops, peak_flops_by_name, training_flops_per_token

torch.set_num_threads(1)

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
GPT2 = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 64,
    "vocab_size": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build(model_type: str, **values: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **values, attn_implementation="eager")
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_llama_by_hand(tied: bool) -> None:
    attention_matrices = 32 * 32 * 2 + 32 * 16 * 2
    matrices = 3 * (attention_matrices + 3 * 32 * 48) + 64 * 32  # the head once, tied or not; no look-up
    assert training_flops_per_token(build("llama", **LLAMA, tie_word_embeddings=tied), 128) == (
        6 * matrices + 6 * 3 * 32 * 128
    )


def test_head_size_apart_from_hidden_size() -> None:
    model = build("llama", **LLAMA, head_dim=16)
    attention_matrices = 32 * 64 * 2 + 32 * 32 * 2
    matrices = 3 * (attention_matrices + 3 * 32 * 48) + 64 * 32
    assert training_flops_per_token(model, 10) == 6 * matrices + 6 * 3 * 64 * 10


@pytest.mark.parametrize(("model_type", "values"), [("llama", LLAMA), ("gpt2", GPT2)])
def test_agrees_with_torchs_counter(model_type: str, values: dict[str, Any]) -> None:
    """torch counts the full attention square, PaLM's causal half of it apart; the first layer's input needs no
    gradient in neither (embeddings do), so the rest is equal to the last operation."""
    model, batch, length = build(model_type, **values), 2, 64
    tokens = torch.randint(0, 40, (batch, length))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(input_ids=tokens).logits.sum())
    matmul = training_flops_per_token(model, 0)
    full_square = 2 * (training_flops_per_token(model, length) - matmul)
    rotary = counter.get_total_flops() - batch * length * (matmul + full_square)
    assert 0 <= rotary < 0.001 * counter.get_total_flops()


def test_frozen_matrices_need_no_weight_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    assert training_flops_per_token(model, 100) == 6 * (32 + 8)
    model[0].requires_grad_(False)
    assert training_flops_per_token(model, 100) == 4 * 32 + 6 * 8


def test_only_active_experts_count() -> None:
    model = build("mixtral", **LLAMA, num_local_experts=8, num_experts_per_tok=2)
    attention_matrices = 32 * 32 * 2 + 32 * 16 * 2
    matrices = 3 * (attention_matrices + 2 * 3 * 32 * 48 + 8 * 32) + 64 * 32
    assert training_flops_per_token(model, 10) == pytest.approx(6 * matrices + 6 * 3 * 32 * 10, rel=1e-12)


def test_a_model_without_attention() -> None:
    assert training_flops_per_token(nn.Conv1d(3, 5, 2, bias=False), 1000) == 6 * 30
    assert training_flops_per_token(nn.Embedding(10, 10), 1000) == 0


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 80GB HBM3", "none", None),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp16", 112e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("Some Future GPU", "bf16", None),
    ],
)
def test_peaks(name: str, precision: str, expected: float | None) -> None:
    assert peak_flops_by_name(name, precision) == expected


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
