"""Whether a model can use a paged cache: which of its modules attend, and whether they compute the same through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from truthgpt.attention.install import install_attention, transformers_attention_in
from truthgpt.attention.paged import flash_serves
from truthgpt.attention.probe import HALF_TOLERANCE, TOLERANCE
from truthgpt.inference.paged_runner import PagedRunner, paged_model
from truthgpt.inference.runner import logits_to_keep
from truthgpt.inference.token_sequence import KeptTokens
from truthgpt.kv_cache.base import LayerShape
from truthgpt.kv_cache.paged import KVPages
from truthgpt.runtime.cuda_graph import CaptureError

PROBE_TOKENS, PROBE_BLOCK = 40, 4


@dataclass(frozen=True)
class AttentionLayers:
    """The modules of a model that attend, in their order.

    Attributes:
        shapes: of the keys of each.
        dtype: type of the keys.
        even: values are of the same size as keys.
        tell_window: some say how far they look back.
        flash: what they compute is what flash attention can.
    """

    modules: list[torch.nn.Module]
    shapes: list[LayerShape]
    dtype: torch.dtype
    even: bool
    tell_window: bool
    flash: bool


def attention_layers(model: PreTrainedModel) -> AttentionLayers:
    """Found by running two tokens: names and configurations differ from family to family."""
    found = AttentionLayers([], [], model.dtype, even=True, tell_window=False, flash=True)

    def note(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **others: Any
    ) -> tuple[torch.Tensor, None]:
        nonlocal found
        found = AttentionLayers(
            [*found.modules, module],
            [*found.shapes, LayerShape(key.shape[1], key.shape[3])],
            key.dtype,
            found.even and key.shape == value.shape,
            found.tell_window or others.get("sliding_window") is not None,
            found.flash and flash_serves(query, others.get("softcap")),
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    if not model._can_set_attn_implementation():  # it would say so in a line of its own
        return found
    configured = str(model.config._attn_implementation)
    model.set_attn_implementation(install_attention("noted", note))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(configured)
    return found


def paged_obstacle(model: PreTrainedModel, layers: AttentionLayers) -> str | None:
    """Why `model` cannot use a paged cache; None: it can, as measured.

    A few random tokens run through it in two parts and one more, and give the logits of one pass with transformers' own
    attention.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if len(layers.modules) != config.num_hidden_layers or len(set(layers.modules)) != len(layers.modules):
        return f"not every layer of {name} attends through transformers' interface"
    if not layers.even:
        return f"keys and values of {name} differ in size"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"{name} looks back by chunks"
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and limit != rope.get("original_max_position_embeddings"):
        return f"one long sequence changes the positions of all others in {name} (rope_type: longrope)"
    tokens = PROBE_TOKENS
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and not layers.tell_window:
        tokens = max(tokens, window + PROBE_BLOCK)  # a mask may know of it, and only these tokens show that
    tokens = min(tokens, limit or tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (tokens,), generator=generator).tolist()
    cache = KVPages(layers.shapes, -(-tokens // PROBE_BLOCK), PROBE_BLOCK, layers.dtype, model.device)
    try:
        with torch.no_grad(), _full_precision():
            with transformers_attention_in(model):
                row, keep = torch.tensor([ids], device=model.device), logits_to_keep(model)(1)
                wanted = model(input_ids=row, use_cache=False, **keep).logits[0, -1]
            with paged_model(model, layers.modules, cache):
                found = _in_parts(PagedRunner(model, cache, layers.flash), ids)
    except (TypeError, ValueError, CaptureError) as error:
        return f"{name} cannot run with it: {str(error).splitlines()[0]}"
    error_size = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    tolerance = TOLERANCE if wanted.dtype == torch.float32 else HALF_TOLERANCE
    return None if error_size <= tolerance else f"the logits of {name} would be off by {error_size:.1e}"


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 are what they are, not TF32: that would be taken for an error of the attention."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _in_parts(runner: PagedRunner, ids: list[int]) -> torch.Tensor:
    """Logits behind the last of `ids`, which run in three passes as an engine runs them: the last is a single token."""
    sequence, half, most = KeptTokens(ids), len(ids) // 2, len(ids) - 1
    runner.start(sequence)
    logits = torch.empty(0)
    for count in (half, most - half, 1):
        if count:
            runner.reserve(sequence, count)
            logits = runner.run([(sequence, count)])
    return logits[0]
