"""Small models whose choices are clear, a tokenizer of bytes, and the tokens they write."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EOS = 256
POSITIONS = 48
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": POSITIONS, **HEADS}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": POSITIONS},
    "llama": {"num_hidden_layers": 2, **LAYERS},
    "qwen3": {"num_hidden_layers": 2, **LAYERS},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 8, **LAYERS},
}
FURTHER: dict[str, dict[str, Any]] = {
    "llama with one head of keys": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        **LAYERS,
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
    },
    "gemma2": {
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "attn_logit_softcapping": 1.0,
        **LAYERS,
        "num_key_value_heads": 1,
    },
    "llama of one layer": {"model_type": "llama", "num_hidden_layers": 1, **LAYERS},
    "mistral": {"num_hidden_layers": 2, "sliding_window": 8, **LAYERS},
}
"""Shapes that attention could get wrong: grouped queries, scores that are bent, a window in every layer."""


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and `<eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<eos>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZER = byte_tokenizer(eos_token="<eos>")


def small_model(kind: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A model whose choices are clear: random weights of this size would leave every logit near zero."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"model_type": kind, "vocab_size": EOS + 1, **(CONFIGS | FURTHER)[kind]})
    # Some versions of transformers leave soft-capping out in sdpa.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def greedy_by_hand(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Argmax of a full forward, one token at a time."""
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
        if ids[-1] == EOS:
            break
    return ids
