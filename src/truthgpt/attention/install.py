"""Makes an attention function usable by transformers models under a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from truthgpt.attention.base import AttentionFunction, capabilities_of
from truthgpt.errors import ConfigError, Problem

OUR_PREFIX = "truthgpt_"
TRANSFORMERS_OWN = "sdpa"
"""transformers' own attention, which builds the masks a model asks for: the reference of the probes, and the one that
generates."""


def install_attention(name: str, function: AttentionFunction) -> str:
    """Register `function` with transformers; returns the `attn_implementation` that selects it.

    It has no mask function: the model then builds no mask, and the backend sees dense causal rows, or packed ones.
    """
    implementation = f"{OUR_PREFIX}{name}"
    AttentionInterface.register(implementation, function)
    return implementation


@contextmanager
def transformers_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """`model` attends through transformers' own `sdpa` inside: generation asks for shapes (one query, many keys) that a
    training backend need not know."""
    configured = str(model.config._attn_implementation)
    if not configured.startswith(OUR_PREFIX):
        yield
        return
    model.set_attn_implementation(TRANSFORMERS_OWN)
    try:
        yield
    finally:
        model.set_attn_implementation(configured)


def check_attention(name: str, function: AttentionFunction, architecture: PreTrainedConfig, max_seq_len: int) -> None:
    """Refuse a model the backend would silently compute wrongly.

    Raises:
        ConfigError: the model has sliding windows shorter than the samples, and the backend does not declare them.
    """
    window = getattr(architecture, "sliding_window", None)
    if isinstance(window, int) and window < max_seq_len and "sliding_window" not in capabilities_of(function):
        message = (
            f"{name} declares no sliding-window attention, and this model looks back {window} tokens in rows of "
            f"{max_seq_len}"
        )
        hint = f"use backend: sdpa, or data.max_seq_len of at most {window}"
        raise ConfigError([Problem(key="model.attention.backend", message=message, suggestion=hint)])
