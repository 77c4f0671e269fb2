"""ATTENTION_BACKENDS: how attention is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truthgpt.factories.registry import NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.attention.base import AttentionFunction

ATTENTION_BACKENDS = Registry("attention backend")


@ATTENTION_BACKENDS.register("sdpa", options=NoOptions)
def build_sdpa() -> AttentionFunction:
    """PyTorch's scaled dot-product attention; always there."""
    from truthgpt.attention.sdpa import sdpa_attention

    return sdpa_attention
