"""Text from a model: the new tokens after each prompt."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from truthgpt.errors import ConfigError
from truthgpt.inference.text_stream import continuation
from truthgpt.runtime.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt.

    Args:
        max_new_tokens: tokens to add at most, 1 or more.
        temperature: logits are divided by it before sampling from the whole vocabulary; 0 is greedy.
        seed: seed of the sampling.
        use_cache: keep keys and values of past tokens (transformers' dynamic cache). Changes the speed, not the tokens.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens} is not allowed: give 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: {self.temperature} is not allowed: give 0 (greedy) or more")


@dataclass(frozen=True)
class Generation:
    """What a model wrote after `prompt`: the new tokens only (an end-of-text token included) and their text."""

    prompt: str
    text: str
    token_ids: list[int]


def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: GenerationSettings
) -> Iterator[Generation]:
    """Continue each prompt, one after the other.

    Sampling for a prompt is seeded from the seed, the prompt and how often it came before in `prompts`, so that what
    else is in the list changes nothing, and the same prompt twice gives two texts. Between two results, and after the
    last one, the model's mode and the global random state are as they were.

    Args:
        model: a causal language model of transformers; its weights are left alone.
        tokenizer: the tokenizer it was trained with; prompts are encoded as `tokenizer(prompt)`.
        prompts: texts to continue. One longer than the context keeps its end; an empty one starts a new text.
        settings: how to continue them.

    Raises:
        ConfigError: an empty prompt and a tokenizer with neither a bos nor an eos token to start from; or a tokenizer
            that is not the model's.
    """
    seen: Counter[str] = Counter()
    stop_ids = _stop_token_ids(model, tokenizer)
    for prompt in prompts:
        seed = derive_seed(settings.seed, "generate", prompt, seen[prompt])
        seen[prompt] += 1
        prompt_ids = encode_prompt(tokenizer, prompt)
        _check_vocabulary(model, prompt, prompt_ids)
        prompt_ids, max_new_tokens = _fit_context(prompt_ids, settings.max_new_tokens, _context_tokens(model))
        config = _generation_config(settings, max_new_tokens, stop_ids, tokenizer)
        new_ids = _generate(model, prompt_ids, config, seed)
        yield Generation(prompt, continuation(tokenizer, prompt_ids, new_ids), new_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: `tokenizer(prompt)` without an end-of-text token that the tokenizer adds by itself.

    Raises:
        ConfigError: nothing to start from: no token, and the tokenizer has neither bos nor eos.
    """
    ids = [int(index) for index in tokenizer(prompt)["input_ids"]]
    eos = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
    if start is None:
        raise ConfigError("the prompt is empty and the tokenizer has no bos or eos token to start from: give a prompt")
    return [int(start)]


def _check_vocabulary(model: PreTrainedModel, prompt: str, prompt_ids: list[int]) -> None:
    """Refuse ids the model has no embedding for here: on a GPU they end the process."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    if max(prompt_ids) >= vocab_size:
        raise ConfigError(
            f"prompt {prompt[:40]!r}: token id {max(prompt_ids)} is not in the model's vocabulary of {vocab_size}; "
            "use the tokenizer the model was trained with"
        )


def _context_tokens(model: PreTrainedModel) -> int | None:
    """Positions the model has; None where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def _fit_context(prompt_ids: list[int], max_new_tokens: int, context: int | None) -> tuple[list[int], int]:
    """The prompt and number of new tokens that fit: n prompt and m new tokens take n + m - 1 positions.

    A prompt longer than the context keeps its end, at least half a context of it; then the new tokens are limited to
    what is left.
    """
    if context is None or len(prompt_ids) + max_new_tokens - 1 <= context:
        return prompt_ids, max_new_tokens
    kept = prompt_ids
    if len(prompt_ids) > context:
        kept = prompt_ids[-max(context // 2, context + 1 - max_new_tokens, 1) :]
    fitting = min(max_new_tokens, context + 1 - len(kept))
    logger.info(
        "the model has %d positions: using %d of %d prompt tokens and writing at most %d of %d new ones",
        *(context, len(kept), len(prompt_ids), fitting, max_new_tokens),
    )
    return kept, fitting


def _stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of a generation config that came with the model's weights.

    One derived from the model's configuration says nothing: its ids are defaults of the architecture (2 for Llama),
    which mean some ordinary token in another vocabulary.
    """
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    own = model.generation_config
    if own is not None and own.eos_token_id is not None and not getattr(own, "_from_model_config", False):
        ids |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    return sorted(ids)


def _generation_config(
    settings: GenerationSettings, max_new_tokens: int, stop_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    # Nothing is padded (one prompt at a time), yet some versions of transformers warn without a pad id.
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=settings.use_cache,
        eos_token_id=stop_ids or None,
        pad_token_id=pad_id,
        **(sampling if settings.temperature > 0 else {"do_sample": False}),
    )


def _generate(model: PreTrainedModel, prompt_ids: list[int], config: GenerationConfig, seed: int) -> list[int]:
    input_ids = torch.tensor([prompt_ids], device=model.device)  # (1, T)
    # Decoding one token at a time would compile every layer anew for shapes that training never uses.
    with (
        torch.compiler.set_stance("force_eager"),
        _evaluating(model),
        _only_config(model, config),
        _seeded(model.device, seed),
    ):
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return [int(index) for index in output[0, len(prompt_ids) :].tolist()]


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


@contextmanager
def _only_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Take the model's own generation config away: `generate` would fill all that ours leaves open from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Generators of the CPU and of `device` seeded inside, and as before afterwards; other devices are not touched."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
