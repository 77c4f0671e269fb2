"""Text from a model: the new tokens after each prompt."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from truthgpt.errors import ConfigError
from truthgpt.inference.engine import Engine
from truthgpt.inference.request import FinishReason, Sampling
from truthgpt.runtime.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after `prompt`: the new tokens only (an end-of-text token included), their text, and why it
    ended."""

    prompt: str
    text: str
    token_ids: list[int]
    finish: FinishReason


def generate_texts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> Iterator[Generation]:
    """Continue the prompts, many at once; the results come in the prompts' order.

    Sampling for a prompt is seeded from the seed, the prompt and how often it came before in `prompts`, so that what
    else is in the list changes nothing, and the same prompt twice gives two texts.

    Args:
        engine: of the model; nothing else asks it meanwhile.
        tokenizer: the tokenizer it was trained with; prompts are encoded as `tokenizer(prompt)`.
        prompts: texts to continue. One longer than the context keeps its end; an empty one starts a new text.
        sampling: how to continue them.

    Raises:
        ConfigError: an empty prompt and a tokenizer with neither a bos nor an eos token to start from; or a tokenizer
            that is not the model's.
    """
    seen: Counter[str] = Counter()
    asked: list[int] = []
    for prompt in prompts:
        own = dataclasses.replace(sampling, seed=derive_seed(sampling.seed, "generate", prompt, seen[prompt]))
        seen[prompt] += 1
        prompt_ids = fit_context(encode_prompt(tokenizer, prompt), sampling.max_new_tokens, engine.context_tokens)
        asked.append(engine.submit(prompt_ids, own))
    results = _Results(engine)
    for request_id, prompt in zip(asked, prompts, strict=True):
        yield results.wait(request_id, prompt)


class _Results:
    """Answers by request, as they are written."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._finished: dict[int, FinishReason] = {}

    def wait(self, request_id: int, prompt: str) -> Generation:
        """The whole answer to `request_id`."""
        while request_id not in self._finished:
            for piece in self._engine.step():
                self._texts.setdefault(piece.request_id, []).append(piece.text)
                self._tokens.setdefault(piece.request_id, []).extend(piece.token_ids)
                if piece.finish is not None:
                    self._finished[piece.request_id] = piece.finish
        text = "".join(self._texts.pop(request_id))
        return Generation(prompt, text, self._tokens.pop(request_id), self._finished.pop(request_id))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt: `tokenizer(prompt)` without an end-of-text token that the tokenizer adds by itself.

    Raises:
        ConfigError: nothing to start from: no token, and the tokenizer has neither bos nor eos; or see `require_text`.
    """
    require_text(prompt)
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


def require_text(text: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        ConfigError: halves of surrogate pairs: Python has them for bytes of a command line that are no UTF-8, and reads
            them from JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        begin = max(error.start - 20, 0)
        raise ConfigError(
            f"the prompt is no text at {text[begin : error.start + 1]!a}: bytes that are not UTF-8, or half of a "
            "surrogate pair; give it in UTF-8"
        ) from error


def fit_context(prompt_ids: list[int], max_new_tokens: int, context: int | None) -> list[int]:
    """The prompt that fits: n prompt and m new tokens take n + m - 1 positions of the `context` (None: no limit).

    One longer than the context keeps its end, at least half a context of it. The engine limits the new tokens to what
    is left; one line says what is cut off of either.
    """
    if context is None or len(prompt_ids) + max_new_tokens - 1 <= context:
        return prompt_ids
    kept = prompt_ids
    if len(prompt_ids) > context:
        kept = prompt_ids[-max(context // 2, context + 1 - max_new_tokens, 1) :]
    logger.info(
        "the model has %d positions: using %d of %d prompt tokens and writing at most %d of %d new ones",
        *(context, len(kept), len(prompt_ids), min(max_new_tokens, context + 1 - len(kept)), max_new_tokens),
    )
    return kept
