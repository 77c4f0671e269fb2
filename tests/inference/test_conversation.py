"""Conversations: the prompts that templates make of them, what is left out of long ones, and where answers end."""

from __future__ import annotations

import pytest
from tests.inference.scripted_engine import ScriptedEngine
from tests.sample_data import CHAT_TEMPLATE
from transformers import PreTrainedTokenizerFast

from truthgpt.errors import ConfigError
from truthgpt.inference.conversation import Conversation, Prompt
from truthgpt.inference.request import Piece, Sampling
from truthgpt.inference.turn_end import TurnEnd, turn_end
from truthgpt.models.tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
MARKS = [257, 258]


def tokenizer(template: str | None, special: bool = True) -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    if special:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def talk(conversation: Conversation, *turns: str) -> None:
    for number, text in enumerate(turns):
        conversation.say(("user", "assistant")[number % 2], text)


def pieces(conversation: Conversation, engine: ScriptedEngine, prompt: Prompt, **sampling: int) -> list[Piece]:
    return list(conversation.answer(engine, prompt, Sampling(**{"max_new_tokens": 50, **sampling})))


@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATE])
def test_prompt_is_what_the_template_makes(template: str, system: str | None) -> None:
    made = tokenizer(template)
    conversation = Conversation(made, None, system)
    talk(conversation, "hi", "hello", "who are you?")
    expected = made.apply_chat_template(conversation.transcript(), add_generation_prompt=True, return_dict=False)
    assert conversation.prompt(50) == Prompt(expected, 0)
    assert (conversation.transcript()[0]["role"] == "system") == (system is not None)


def test_without_a_template_the_text_goes_on() -> None:
    made = tokenizer(None)
    conversation = Conversation(made, None, "Once")
    assert not conversation.has_template
    talk(conversation, "upon a", " time there", "was")
    assert made.decode(conversation.prompt(5).token_ids) == "Once\nupon a time there\nwas"


@pytest.mark.parametrize("context", [30, 47, 48, 49, 60, 90, 200])
@pytest.mark.parametrize("wanted", [1, 10, 500])
@pytest.mark.parametrize("template", [CHATML, None])
def test_the_oldest_questions_are_left_out(context: int, wanted: int, template: str | None) -> None:
    """Against every possible start, longest first."""
    made = tokenizer(template)
    conversation, free = Conversation(made, context, "s"), Conversation(made, None, "s")
    talk(conversation, "question one", "answer one", "two?", "yes", "three?")
    lengths = {}
    for first in (0, 2, 4):
        free.messages = conversation.messages[first:]
        lengths[first] = free.prompt(1).token_ids
    room = [first for first in lengths if len(lengths[first]) + min(wanted, context // 2) - 1 <= context]
    if len(lengths[4]) > context:
        with pytest.raises(ConfigError, match=f"it and the system message have {len(lengths[4])} tokens"):
            conversation.prompt(wanted)
        return
    first = min(room, default=4)
    assert conversation.prompt(wanted) == Prompt(lengths[first], first)
    assert len(conversation.messages) == 5, "nothing is forgotten"
    engine = ScriptedEngine(made, ["x" * 300], context)
    written = pieces(conversation, engine, conversation.prompt(wanted), max_new_tokens=wanted)
    assert len(written) == min(wanted, context + 1 - len(lengths[first]))


def test_answer_ends_where_the_template_ends_it() -> None:
    made = tokenizer(CHATML)
    conversation = Conversation(made, None)
    assert conversation.turn_end == TurnEnd(ids=frozenset({258}))
    talk(conversation, "hi")
    engine = ScriptedEngine(made, ["hello<|im_end|>\n<|im_start|>user\nmore"])
    written = pieces(conversation, engine, conversation.prompt(50))
    assert "".join(piece.text for piece in written) == "hello"
    assert written[-1].finish == "stop" and written[-1].token_ids == (258,)
    assert engine.cancelled == [] and not engine.has_work


@pytest.mark.parametrize(
    ("template", "special", "text"),
    [(CHAT_TEMPLATE, True, "<user>"), (CHATML, False, "<|im_end|>\n<|im_start|>user"), (NO_SYSTEM, True, "")],
)
def test_what_follows_an_answer_is_a_stop_text(template: str, special: bool, text: str) -> None:
    conversation = Conversation(tokenizer(template, special), None)
    assert conversation.turn_end.text == text
    talk(conversation, "hi")
    engine = ScriptedEngine(byte_tokenizer(), ["x"])
    pieces(conversation, engine, conversation.prompt(50))
    assert engine.asked[0][1].stop == ((text,) if text else ())


def test_a_token_that_is_shown_ends_an_answer_as_a_text() -> None:
    """One that was added, but not as a special token, is part of what is decoded."""
    made = tokenizer(CHATML, special=False)
    made.add_tokens(["<|im_end|>"])
    assert turn_end(made) == TurnEnd(text="<|im_end|>")


def test_an_answer_ends_by_itself() -> None:
    conversation = Conversation(tokenizer(CHATML), None)
    talk(conversation, "hi")
    engine = ScriptedEngine(byte_tokenizer(), ["hello"])
    written = pieces(conversation, engine, conversation.prompt(50))
    assert [piece.text for piece in written] == [*"hello", ""] and written[-1].finish == "stop"
    assert engine.cancelled == []


def test_closing_breaks_the_answer_off() -> None:
    conversation = Conversation(tokenizer(CHATML), None)
    talk(conversation, "hi")
    engine = ScriptedEngine(byte_tokenizer(), ["hello"])
    answer = conversation.answer(engine, conversation.prompt(50), Sampling())
    assert next(answer).text == "h"
    answer.close()
    assert engine.cancelled == [0] and not engine.has_work


def test_a_template_that_refuses() -> None:
    conversation = Conversation(tokenizer(NO_SYSTEM), None, "be kind")
    talk(conversation, "hi")
    with pytest.raises(ConfigError, match="chat template refuses this conversation: no system message"):
        conversation.prompt(5)
