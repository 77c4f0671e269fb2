"""Causal language models of transformers: building one, and its loss."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from truthgpt.attention.base import packed_arguments
from truthgpt.data.base import IGNORED_LABEL, Batch, LossAndLogits
from truthgpt.errors import ConfigError, Problem
from truthgpt.models.linear_cross_entropy import linear_cross_entropy
from truthgpt.models.lora import ADAPTER_CONFIG
from truthgpt.models.output_head import last_hidden_states, output_head
from truthgpt.models.quantized_base import nf4_config, prepare_quantized
from truthgpt.runtime.compile import decoder_layers
from truthgpt.runtime.flops import weight_count
from truthgpt.runtime.hub import cache_when_unreachable
from truthgpt.runtime.seeds import derive_seed, random_state_kept

logger = logging.getLogger(__name__)


def quiet_transformers() -> None:
    """Stop transformers' own progress bars and advice: what a user must know is said by this project."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def transformers_attention(architecture: PreTrainedConfig) -> Literal["sdpa", "eager"]:
    """The fastest attention that transformers itself has for this model: some only have `eager`."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(architecture), None)
    return "eager" if model_class is not None and not model_class._supports_sdpa else "sdpa"


def build_causal_lm(
    architecture: PreTrainedConfig, attention: str, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with random weights, on torch's default device; they depend on the arguments and that device's kind only.

    Args:
        attention: name of an attention implementation transformers knows.
        dtype: type the weights are made in.
    """
    with random_state_kept():
        torch.manual_seed(derive_seed(seed, "initial weights"))
        model = AutoModelForCausalLM.from_config(architecture, attn_implementation=attention, dtype=dtype)
    return cast(PreTrainedModel, model)


def load_causal_lm(
    name_or_path: str,
    architecture: PreTrainedConfig,
    attention: str,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    quantized_on: torch.device | None = None,
) -> PreTrainedModel:
    """A pretrained model.

    Args:
        dtype: type the weights are read in; float32 ones are the optimizer's master copy.
        quantized_on: hold the linear layers in NF4, which is made on this device; None: in `dtype`.

    Raises:
        ConfigError: no weights at `name_or_path`, or weights that do not fit `architecture`.
    """
    quantized = {}
    if quantized_on is not None:
        quantized = {"quantization_config": nf4_config(dtype), "device_map": {"": quantized_on}}
    try:
        with random_state_kept(), cache_when_unreachable(name_or_path):
            torch.manual_seed(derive_seed(0, "missing weights"))  # random, and the same ones for whoever loads it again
            model, report = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=architecture,
                output_loading_info=True,
                attn_implementation=attention,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **quantized,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        message = f"no weights can be loaded from {name_or_path!r}: {reason}"
        hint = "model.init: scratch starts from random weights"
        if (Path(name_or_path) / ADAPTER_CONFIG).is_file():
            hint = "it holds adapters, not a model: name their base, or merge them into it with peft first"
        raise ConfigError([Problem(key="model.name_or_path", message=message, suggestion=hint)]) from error
    for kind in ("missing_keys", "unexpected_keys"):
        names = sorted(report[kind])
        if names:
            logger.warning("%s: %d %s weights, for example %s", name_or_path, len(names), kind.split("_")[0], names[0])
    if quantized_on is not None:
        prepare_quantized(model)
    return cast(PreTrainedModel, model)


def fit_vocabulary(architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, given: int | None) -> None:
    """Set the vocabulary and special tokens of a model from scratch to the tokenizer's.

    Args:
        given: `model.config.vocab_size`, which may be larger than the tokenizer's, not smaller; None: the tokenizer's.

    Raises:
        ConfigError: `given` is too small.
    """
    needed = len(tokenizer)
    check_vocabulary(given or needed, needed)
    architecture.vocab_size = given or needed
    architecture.bos_token_id = tokenizer.bos_token_id
    architecture.eos_token_id = tokenizer.eos_token_id
    # Not the padding id: transformers would freeze that embedding at zero, and it is the end-of-text token here; and
    # GPT-2 would look for it in every batch, which waits for the GPU. Generation has it in its own configuration.
    architecture.pad_token_id = None


def check_vocabulary(model_size: int, tokenizer_size: int) -> None:
    """Raise ConfigError when the tokenizer has ids the model has no embedding for."""
    if model_size < tokenizer_size:
        message = f"the model has {model_size} token embeddings, the tokenizer {tokenizer_size} tokens"
        hint = f"leave it out, or set it to at least {tokenizer_size}"
        raise ConfigError([Problem(key="model.config.vocab_size", message=message, suggestion=hint)])


def set_generation_defaults(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, turn_end_ids: Collection[int]
) -> None:
    """Give the model the stop and padding ids it is saved with.

    Args:
        turn_end_ids: tokens with which the chat template ends an answer. Whatever loads the saved model reads no
            template while it writes, and without them would go on with a question of its own.
    """
    end = tokenizer.eos_token_id
    stops = [*([] if end is None else [int(end)]), *sorted(set(turn_end_ids) - {end})]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else next(iter(stops), None),
        pad_token_id=tokenizer.pad_token_id,
    )


def enable_gradient_checkpointing(model: nn.Module, layers: int) -> None:
    """Recompute activations in the backward pass; non-reentrant, so that frozen inputs keep their gradients.

    Args:
        layers: how many of the decoder layers, from the first on: those after them are done with, and their
            activations gone, when the first ones are computed again. A model that cannot choose takes all.
    """
    # Renamed in transformers 5.23; 5.17 has only the older name.
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})
    for layer in decoder_layers(model)[layers:]:
        if hasattr(layer, "gradient_checkpointing"):
            setattr(layer, "gradient_checkpointing", False)  # noqa: B010  # mypy takes a module's attributes for tensors


def causal_lm_loss(model: PreTrainedModel, batch: Batch) -> LossAndLogits:
    """Summed cross-entropy in nats over the supervised positions (0-d), and what computes the logits `(B, T, V)`.

    The logits of a whole batch are never made for the loss; for a model that `head_completes_body`.

    No attention mask: rows are padded on the right, and a causal model never looks there; padding has no label. Packed
    rows (a batch with `cu_seq_lens`) keep their documents apart by what the model is called with.
    """
    head = output_head(model)
    assert head is not None  # asked before this loss was chosen
    hidden = last_hidden_states(model, **_inputs(batch))
    loss = linear_cross_entropy(hidden.flatten(0, 1), head, batch["labels"].flatten())
    return loss, partial(head.logits, hidden)


def whole_logits_loss(model: nn.Module, batch: Batch) -> LossAndLogits:
    """`causal_lm_loss` by way of all logits, for a model whose head does more than is known."""
    logits: torch.Tensor = model(use_cache=False, **_inputs(batch)).logits
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return loss, lambda: logits


def _inputs(batch: Batch) -> dict[str, Any]:
    packed = packed_arguments(batch["position_ids"], batch["cu_seq_lens"]) if "cu_seq_lens" in batch else {}
    return {"input_ids": batch["input_ids"], **packed}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones; a tied weight counts once."""
    parameters = list(model.parameters())
    return sum(weight_count(p) for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
