"""The last hidden states of a causal language model, and the head that makes logits of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from truthgpt.models.added_tokens import AddedTokens
from truthgpt.models.linear_cross_entropy import OutputHead
from truthgpt.runtime.precision import in_float32

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest one, that is put down to rounding."""
PROBE_TOKENS = 16


def last_hidden_states(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """What the model's body gives to its head, `(B, T, D)`."""
    hidden: torch.Tensor = _body(model)(use_cache=False, **inputs).last_hidden_state
    return hidden


def output_head(model: PreTrainedModel) -> OutputHead | None:
    """The model's head; None when it is no linear layer over a body.

    Besides the layer, families of transformers scale the logits (`logit_scale` in Cohere, `logits_scaling` in Granite)
    or bend them (`final_logit_softcapping` in Gemma 2).
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear | AddedTokens) or _body(model) is model:
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def _body(model: PreTrainedModel) -> nn.Module:
    """What stands below the head; the model itself when it names no such part."""
    body: nn.Module = model.base_model
    # Llama 4 names a body that only its multimodal form has.
    return getattr(model, "model", body) if body is model else body


def head_completes_body(model: PreTrainedModel) -> bool:
    """Whether `last_hidden_states` and `output_head` give the logits of the whole model.

    Measured on a few random tokens: a family may do more between the two than is known here.
    """
    if output_head(model) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocab_size, (1, PROBE_TOKENS), generator=generator).to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), in_float32(model):
            whole = model(input_ids=ids, use_cache=False).logits
            hidden = last_hidden_states(model, input_ids=ids)
            with in_float32(model.get_output_embeddings()):
                head = output_head(model)  # here, where its weight is float32
                assert head is not None
                parts = head.logits(hidden)
    finally:
        model.train(training)
    return float((parts - whole).abs().max()) <= TOLERANCE * float(whole.abs().max())  # false for NaN
