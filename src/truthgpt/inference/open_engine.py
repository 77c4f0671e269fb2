"""An engine over a model, for as long as it is needed: afterwards the model is as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from truthgpt.attention.install import transformers_attention_in
from truthgpt.errors import ConfigError
from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.joined_linear import joined_linears
from truthgpt.inference.packed_linear import packed_linears
from truthgpt.inference.paged_probe import AttentionLayers, attention_layers, paged_obstacle
from truthgpt.inference.paged_runner import PagedRunner, paged_model
from truthgpt.inference.runner import OneByOneRunner, Runner
from truthgpt.kv_cache.base import KVCachePolicy
from truthgpt.kv_cache.paged import PagedKVCache, block_bytes
from truthgpt.runtime.compile import decoder_layers
from truthgpt.runtime.device import free_memory_bytes, has_triton
from truthgpt.runtime.fallbacks import Fallbacks

logger = logging.getLogger(__name__)

SHARE = 0.85
"""The part of a GPU's free memory that the cache takes when nothing is said; the rest is for activations and logits."""
HOST_BYTES = 2 * 2**30
"""What it takes at most on other devices."""
RECOMPILE_LIMIT = 32
"""Shapes a layer is compiled for before it stays eager."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a model.

    Args:
        cache_bytes: memory of a paged cache; None: most of what a GPU has free, or 2 GiB elsewhere.
        compiled: on a GPU, compile the layers: about ten seconds at first, for more tokens a second.
        streaming: text comes with every token, not at the end.
        limits: how much is done at once.
    """

    cache_bytes: int | None = None
    compiled: bool = False
    streaming: bool = False
    limits: EngineLimits = field(default_factory=EngineLimits)


@contextmanager
def open_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: KVCachePolicy,
    fallbacks: Fallbacks,
    options: EngineOptions | None = None,
    lengths: Sequence[int] | None = None,
    model_name: str = "",
) -> Iterator[Engine]:
    """An engine that runs `model`; its mode, attention and weights are as before afterwards.

    Args:
        policy: which cache to keep. A model that cannot use a paged one keeps transformers' own, with one line.
        lengths: positions that each request needs, for a cache that holds no more than all of them; None: not known.

    Raises:
        ConfigError: the cache would not hold a single block, or is to take more memory than there is.
    """
    options = options or EngineOptions()
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        compiled = options.compiled and model.device.type == "cuda" and has_triton()
        if not compiled:  # layers that were compiled for training: every length would be compiled anew
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if model.device.type == "cpu":
            stack.enter_context(packed_linears(model))
        runner = _paged(model, policy, fallbacks, options.cache_bytes, lengths, compiled, stack)
        if runner is None:
            stack.enter_context(transformers_attention_in(model))
            runner = OneByOneRunner(model, use_cache=policy.keeps)
        yield Engine(model, tokenizer, runner, options.limits, model_name, options.streaming)


def _paged(
    model: PreTrainedModel,
    policy: KVCachePolicy,
    fallbacks: Fallbacks,
    cache_bytes: int | None,
    lengths: Sequence[int] | None,
    compiled: bool,
    stack: ExitStack,
) -> Runner | None:
    """A runner with a paged cache; None: there is to be none, or `model` cannot use it."""
    if not isinstance(policy, PagedKVCache):
        return None
    size = policy.block_size
    layers = attention_layers(model)
    reason = paged_obstacle(model, layers)
    if reason is not None:
        fallbacks.take("model.kv_cache.type", "paged", "transformers' own cache, one sequence at a time", reason)
        return None
    count = _blocks(model.device, layers, size, cache_bytes, lengths)
    cache = policy.allocate(layers.shapes, count, layers.dtype, model.device)
    if compiled:
        stack.enter_context(joined_linears(model))
        # One for decoding and one for prompts, each again for single rows and for strides that happen to agree.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT))
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    stack.enter_context(paged_model(model, layers.modules, cache))
    return PagedRunner(model, cache, flash=layers.flash)


def _blocks(
    device: torch.device,
    layers: AttentionLayers,
    size: int,
    cache_bytes: int | None,
    lengths: Sequence[int] | None,
) -> int:
    free = free_memory_bytes(device)
    asked = cache_bytes
    if cache_bytes is None:
        cache_bytes = int(SHARE * free) if device.type == "cuda" and free is not None else HOST_BYTES
    of_one = block_bytes(layers.shapes, size, layers.dtype)
    count = cache_bytes // of_one
    if count < 1:
        raise ConfigError(
            f"a block of {size} positions takes {of_one:,} bytes, the cache has {cache_bytes:,}: give it more memory"
        )
    if lengths is not None:
        count = min(count, sum(-(-length // size) for length in lengths))
    if asked is not None and free is not None and count * of_one > free:
        raise ConfigError(f"the cache is to take {count * of_one:,} bytes, {device} has {free:,} free: give it less")
    return count


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module has the mode it had, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
