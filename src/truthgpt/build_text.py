"""Language modelling: a causal model, its tokenizer and its loaders from a Config. Layer 4."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.build_attention import attend, build_attention, check_causal, choose_packing
from truthgpt.build_data import bucket_bins, build_eval_loader, build_tokenizer, build_train_loader, tokenize_text
from truthgpt.build_sources import build_text_data
from truthgpt.config.schema import Config
from truthgpt.data.base import Batch
from truthgpt.data.collate import PackedCollator
from truthgpt.errors import ConfigError
from truthgpt.inference.turn_end import turn_end
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.adapted_linear import share_inputs
from truthgpt.models.added_tokens import missing_tokens, resize_embeddings
from truthgpt.models.architecture import check_context, load_architecture
from truthgpt.models.causal_lm import (
    build_causal_lm,
    causal_lm_loss,
    enable_gradient_checkpointing,
    fit_vocabulary,
    load_causal_lm,
    set_generation_defaults,
    transformers_attention,
    whole_logits_loss,
)
from truthgpt.models.lora import LoraSettings, add_adapters, add_tokens, require_peft
from truthgpt.models.output_head import PROBE_TOKENS, head_completes_body
from truthgpt.models.quantized_base import refuse_quantized, require_bitsandbytes
from truthgpt.models.tokenizer import load_tokenizer
from truthgpt.runtime.fallbacks import Fallbacks
from truthgpt.runtime.flops import training_flops_per_token
from truthgpt.runtime.precision import Precision
from truthgpt.task import TaskParts
from truthgpt.trainers.engine import Objective

logger = logging.getLogger(__name__)


def build_text_task(
    config: Config, plan: MemoryPlan, device: torch.device, precision: Precision, fallbacks: Fallbacks
) -> TaskParts:
    """Build in this order: architecture, backend, source, tokenizer, model, adapters, probes, tokens, loaders.

    Raises:
        ConfigError: a name or value that only the libraries or the machine can refuse.
        DataError: the data cannot be read.
    """
    if config.model.lora.enabled:
        require_peft()
    if config.model.lora.quantization != "none":
        require_bitsandbytes()
    length = config.data.max_seq_len
    architecture = load_architecture(config.model.name_or_path, config.model.config, config.model.trust_remote_code)
    check_context(architecture, length, from_scratch=config.model.name_or_path is None)
    backend = build_attention(config, architecture, device, precision, fallbacks)

    data = build_text_data(config)
    tokenizer = build_tokenizer(config, data)
    model = _build_model(config, architecture, tokenizer, device, precision)
    check_causal(model)
    if config.model.lora.enabled:
        _add_adapters(config, model, tokenizer, plan)
    if plan.checkpointed_layers:
        enable_gradient_checkpointing(model, plan.checkpointed_layers)
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
        tokens_per_step=_positions(config, plan.micro_batch_size) * plan.grad_accum_steps,
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


def _build_model(
    config: Config,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    precision: Precision,
) -> PreTrainedModel:
    """With transformers' own attention; the backend takes its place once it is probed.

    A random model is made on the device: a billion weights take 12 s on a CPU and next to nothing on a GPU. One that is
    to be frozen is in the run's precision from the start: there is no copy of it in float32, which nobody would need.
    """
    wanted, attention, frozen = config.model, transformers_attention(architecture), config.model.lora.enabled
    dtype = torch.bfloat16 if frozen and precision.name == "bf16" else torch.float32
    base = _pretrained(config)
    if base is not None:
        refuse_quantized(base, architecture)
        quantized_on = None if wanted.lora.quantization == "none" else device
        model = load_causal_lm(base, architecture, attention, wanted.trust_remote_code, dtype, quantized_on)
        if not frozen and missing_tokens(model, len(tokenizer)):
            _say_added(missing_tokens(model, len(tokenizer)))
            resize_embeddings(model, len(tokenizer))
    else:
        fit_vocabulary(architecture, tokenizer, wanted.config.get("vocab_size"))
        with device:
            model = build_causal_lm(architecture, attention, config.seed, dtype)
    set_generation_defaults(model, tokenizer, turn_end(tokenizer).ids)
    return model.to(device)


def _pretrained(config: Config) -> str | None:
    """Where the weights come from; None: from nowhere, they are random."""
    return None if config.model.init == "scratch" else config.model.name_or_path


def _add_adapters(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, plan: MemoryPlan) -> None:
    wanted, base = config.model.lora, _pretrained(config)
    if base is not None and Path(base).is_dir():
        base = str(Path(base).absolute())  # whoever loads the adapters may be in another working directory
    settings = LoraSettings(wanted.r, wanted.alpha, wanted.dropout, wanted.target_modules, wanted.method)
    left_out = add_adapters(model, settings, base, config.seed)
    if left_out:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in left_out}))
        logger.info("%d layers are not adapted: peft takes %s for this model's stacked experts", len(left_out), names)
    _warn_of_frozen_tokens(config, model, tokenizer)
    added = missing_tokens(model, len(tokenizer))
    if added:
        _say_added(added)
        add_tokens(model, added)
    if not plan.checkpointed_layers:  # which `SharedInput` cannot stand under torch.compile
        share_adapter_inputs(model)


def _say_added(tokens: int) -> None:
    logger.info("%d tokens of the tokenizer are not in the model: as many rows are added, the mean of its own", tokens)


def _warn_of_frozen_tokens(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Many models have a few hundred embeddings more than tokens; new tokens that fall on those are frozen too."""
    base = _pretrained(config)
    if base is None or config.model.tokenizer.type != "path":
        return
    try:
        known = len(load_tokenizer(base, config.model.trust_remote_code))
    except ConfigError:  # it comes without one
        return
    spare = range(known, len(tokenizer) - missing_tokens(model, len(tokenizer)))
    if spare:
        logger.warning(
            "%d tokens of the tokenizer, for example %r, are new to %s, which has unused embeddings for them: they are "
            "frozen like all of its own (model.lora.enabled: false trains them)",
            len(spare),
            tokenizer.convert_ids_to_tokens(spare[0]),
            base,
        )


def share_adapter_inputs(model: PreTrainedModel) -> None:
    """Let adapters with one input share its product, see `share_inputs`."""
    share_inputs(model, torch.zeros((1, PROBE_TOKENS), dtype=torch.long, device=model.device))


def _positions(config: Config, rows: int) -> int:
    """The most that a micro-batch has: of `data.max_tokens`, short samples may fill more than long ones."""
    most = rows * config.data.max_seq_len
    return most if bucket_bins(config.data) is None else max(most, config.data.max_tokens or 0)


def _example(rows: int, length: int, packed: bool) -> Batch:
    """A micro-batch of zeros."""
    batch = PackedCollator(rows, length, pad_token_id=0)([])
    batch["labels"].zero_()
    return batch if packed else {key: batch[key] for key in ("input_ids", "labels")}
