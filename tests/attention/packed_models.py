"""One small model of every family that packing is promised for, and packed batches with their documents alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from truthgpt.attention.install import install_attention
from truthgpt.attention.sdpa import sdpa_attention
from truthgpt.data.base import Batch
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm

VOCABULARY, WINDOW, LENGTH = 64, 8, 60
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_BOTH_LAYERS = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64},
    "llama": {"model_type": "llama", **COMMON},
    "qwen3": {
        **{"model_type": "qwen3", **COMMON, "layer_types": _BOTH_LAYERS},
        **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    },
    "gemma3": {"model_type": "gemma3_text", **COMMON, "layer_types": _BOTH_LAYERS, "sliding_window": WINDOW},
    "mistral": {"model_type": "mistral", **COMMON, "sliding_window": WINDOW},
}


def model_of(values: dict[str, Any], implementation: str | None = None) -> PreTrainedModel:
    name = implementation or install_attention("sdpa", sdpa_attention)
    return build_causal_lm(load_architecture(None, values, trust_remote_code=False), name, seed=0)


def packed_batch(lengths: list[list[int]], seed: int = 0) -> tuple[Batch, list[torch.Tensor]]:
    """Rows of documents of these lengths, and every document alone; the last label of each is ignored."""
    generator = torch.Generator().manual_seed(seed)
    alone = [torch.randint(0, VOCABULARY, (n,), generator=generator) for row in lengths for n in row]
    labels = [torch.cat([ids[1:], torch.tensor([-100])]) for ids in alone]
    positions = [torch.arange(len(ids)) for ids in alone]
    borders = torch.tensor([0, *[len(ids) for ids in alone], 0, 0, 0]).cumsum(0).to(torch.int32)
    batch = {
        "input_ids": torch.cat(alone).view(len(lengths), -1),
        "labels": torch.cat(labels).view(len(lengths), -1),
        "position_ids": torch.cat(positions).view(len(lengths), -1),
        "cu_seq_lens": borders,
    }
    return batch, alone
