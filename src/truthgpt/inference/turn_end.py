"""Where a chat template ends an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from truthgpt.data.chat_answers import EXPRESSION_ERRORS
from truthgpt.inference.request import Sampling


@dataclass(frozen=True)
class TurnEnd:
    """What a chat template puts between an answer and the next question. A model that was trained on its text writes
    this behind an answer, and then goes on with a question of its own.

    Attributes:
        ids: special tokens that begin it.
        text: how it begins where that is no special token; empty: nothing is known.
    """

    ids: frozenset[int] = frozenset()
    text: str = ""

    def ending(self, sampling: Sampling) -> Sampling:
        """`sampling` for an answer that ends there, at the latest."""
        stop = (*sampling.stop, self.text) if self.text else sampling.stop
        return replace(sampling, stop=stop, stop_ids=self.ids)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The end of an answer in the chat template of `tokenizer`; nothing is known of a template that refuses a
    conversation of a question, an answer and a question, nor without a template."""
    if tokenizer.chat_template is None:
        return TurnEnd()
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"<<{index}>>"} for index, role in enumerate(roles)]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, *EXPRESSION_ERRORS):
        return TurnEnd()
    between = text.partition("<<1>>")[2].partition("<<2>>")[0].strip()
    ids = [int(index) for index in tokenizer(between, add_special_tokens=False)["input_ids"]]
    if not ids:
        return TurnEnd()
    added = tokenizer.added_tokens_decoder.get(ids[0])
    if ids[0] in tokenizer.all_special_ids or (added is not None and added.special):
        return TurnEnd(ids=frozenset({ids[0]}))
    return TurnEnd(text=between if added is None else added.content)
