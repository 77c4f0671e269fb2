"""Language modelling: a causal model, its tokenizer and its loaders from a Config. Layer 4."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.build_attention import attend, build_attention, choose_packing
from truthgpt.build_data import build_eval_loader, build_tokenizer, build_train_loader, tokenize_text
from truthgpt.build_sources import build_text_data
from truthgpt.config.schema import Config
from truthgpt.data.base import Batch
from truthgpt.data.collate import PackedCollator
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.architecture import check_context, load_architecture
from truthgpt.models.causal_lm import (
    build_causal_lm,
    causal_lm_loss,
    check_vocabulary,
    enable_gradient_checkpointing,
    fit_vocabulary,
    load_causal_lm,
    set_generation_defaults,
    transformers_attention,
    whole_logits_loss,
)
from truthgpt.models.output_head import head_completes_body
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.flops import training_flops_per_token
from truthgpt.runtime.precision import Precision
from truthgpt.task import TaskParts
from truthgpt.trainers.engine import Objective


def build_text_task(
    config: Config, plan: MemoryPlan, device: torch.device, precision: Precision, fallbacks: Fallbacks
) -> TaskParts:
    """Build in this order: architecture, backend, source, tokenizer, model, tokens, probes, loaders.

    Raises:
        ConfigError: a name or value that only the libraries or the machine can refuse.
        DataError: the data cannot be read.
    """
    length = config.data.max_seq_len
    architecture = load_architecture(config.model.name_or_path, config.model.config, config.model.trust_remote_code)
    check_context(architecture, length)
    backend = build_attention(config, architecture, device, precision, fallbacks)

    data = build_text_data(config)
    tokenizer = build_tokenizer(config, data)
    model = _build_model(config, architecture, tokenizer).to(device)
    if plan.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    attends = attend(config, model, backend, precision, fallbacks)
    text = tokenize_text(data, tokenizer)
    packed = choose_packing(config, text, model, backend, attends, precision)
    return TaskParts(
        model=model,
        objective=choose_loss(model, fallbacks),
        tokenizer=tokenizer,
        processor=tokenizer,
        train_loader=build_train_loader(config, text, plan, packed, device, fallbacks),
        eval_loader=build_eval_loader(config, data, tokenizer, packed, device, fallbacks),
        example=_example(plan.micro_batch_size, length, packed),
        fixed_shapes=packed or not data.has_rows,
        tokens_per_step=plan.micro_batch_size * plan.grad_accum_steps * length,
        unit="tokens",
        flops_per_token=training_flops_per_token(model, length),
    )


def choose_loss(model: PreTrainedModel, fallbacks: Fallbacks) -> Objective:
    """The loss that never holds a batch's logits, or the one that does where the model's head is more than a layer."""
    if head_completes_body(model):
        return causal_lm_loss
    reason = f"the logits of {type(model).__name__} are not those of a linear layer over its last hidden states"
    fallbacks.take("the loss", "cross-entropy in chunks", "cross-entropy of all logits", reason)
    return whole_logits_loss


def _build_model(config: Config, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """With transformers' own attention; the backend takes its place once it is probed."""
    wanted, attention = config.model, transformers_attention(architecture)
    if wanted.name_or_path is not None and wanted.init != "scratch":
        check_vocabulary(architecture.vocab_size, len(tokenizer))
        model = load_causal_lm(wanted.name_or_path, architecture, attention, wanted.trust_remote_code)
    else:
        fit_vocabulary(architecture, tokenizer, wanted.config.get("vocab_size"))
        model = build_causal_lm(architecture, attention, config.seed)
    set_generation_defaults(model, tokenizer)
    return model


def _example(rows: int, length: int, packed: bool) -> Batch:
    """A micro-batch of zeros."""
    batch = PackedCollator(rows, length, pad_token_id=0)([])
    batch["labels"].zero_()
    return batch if packed else {key: batch[key] for key in ("input_ids", "labels")}
