"""Prompts and conversations as token ids, off the event loop."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from truthgpt.data.chat_answers import EXPRESSION_ERRORS
from truthgpt.inference.generate import encode_prompt
from truthgpt.inference.turn_end import turn_end
from truthgpt.serving.api_error import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Makes token ids of what clients send, one request at a time in a thread of its own.

    It has a copy of the tokenizer: the engine decodes with the other one, and a tokenizer used by two threads at once
    can fail ("Already borrowed").

    Attributes:
        turn_end: where the chat template ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self.turn_end = turn_end(self._tokenizer)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of every prompt; lists of ids stay as they are.

        Raises:
            ConfigError: an empty text, and the tokenizer has no token to start from.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._encode, prompts)

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins, as the model was trained on them.

        Raises:
            ApiError: 400: the model has no chat template, or its template refuses the conversation.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._encode_chat, messages)

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [encode_prompt(self._tokenizer, each) if isinstance(each, str) else each for each in prompts]

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise ApiError(
                400,
                "this model has no chat template, so it was not trained on conversations: use /v1/completions with a "
                "prompt",
                code="no_chat_template",
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, *EXPRESSION_ERRORS) as error:
            raise ApiError(
                400, f"messages: the model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        # The template has written the special tokens already.
        ids = [int(index) for index in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise ApiError(400, "messages: the model's chat template makes no text of them", param="messages")
        return ids
