"""Every template family against token lists built by hand from the pieces of its turns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from truthgpt.data import tokenization
from truthgpt.data.base import Conversation, Document, Segment
from truthgpt.data.chat import ChatRenderer, load_chat_template
from truthgpt.data.tokenization import DocumentEncoder, TokenRun, group_documents
from truthgpt.errors import ConfigError, DataError

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]
"""Text and whether it is trained."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
DROPS_THINKING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set said = m.content -%}{%- set thought = '' -%}
{%- if m.role == 'assistant' and '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\n' + thought + '\n</think>\n\n' -}}
{%- endif -%}
{{- said + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
HEADERS = (
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ strftime_now('a day') }}<|eot|>"
    "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MODEL_ROLE = (
    "{{ bos_token }}{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TAGS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
PLAIN = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
EOS = "</s>"
BOS = "<s>"


def chatml_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", answer), ("\n", False)]
    return pieces


def marked_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces += [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>\n", m["role"] == "assistant")]
    return pieces


def drops_thinking_pieces(messages: Sequence[Message]) -> Pieces:
    last = max((index for index, m in enumerate(messages) if m["role"] == "user"), default=-1)
    pieces: Pieces = []
    for index, m in enumerate(messages):
        said, thought, answer = m["content"], "", m["role"] == "assistant"
        if answer and "</think>" in said:
            thought = said.split("</think>")[0].split("<think>")[-1].strip("\n")
            said = said.split("</think>")[-1].lstrip("\n")
        if answer and index > last:
            said = f"<think>\n{thought}\n</think>\n\n{said}"
        pieces += [(f"<|im_start|>{m['role']}\n", False), (said + "<|im_end|>", answer), ("\n", False)]
    return pieces


def headers_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [(f"{BOS}<|head|>system<|/head|>\n\nToday: a day<|eot|>", False)]
    for m in messages:
        pieces += [(f"<|head|>{m['role']}<|/head|>\n\n", False)]
        pieces += [(m["content"].strip() + "<|eot|>", m["role"] == "assistant")]
    return pieces


def model_role_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f"<start>{'model' if answer else m['role']}\n", False)]
        pieces += [(m["content"].strip() + "<end>", answer), ("\n", False)]
    return pieces


def inst_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f" {m['content']}{EOS}", True) if answer else (f"[INST] {m['content']} [/INST]", False)]
    return pieces


def tags_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f"<|{m['role']}|>\n", False), (m["content"] + EOS, answer), ("\n", False)]
    return pieces


def plain_pieces(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        answer = m["role"] == "assistant"
        pieces += [(f"### {m['role']}:\n", False), (m["content"], answer), ("\n\n", False)]
    return pieces


@dataclass(frozen=True)
class Family:
    template: str
    pieces: Callable[[Sequence[Message]], Pieces]
    eos: str = EOS
    alternates: bool = False


FAMILIES = {
    "chatml": Family(CHATML, chatml_pieces, "<|im_end|>"),
    "chatml without its end token as eos": Family(CHATML, chatml_pieces),
    "generation marks": Family(MARKED, marked_pieces, "<|im_end|>"),
    "drops thinking (Qwen 3)": Family(DROPS_THINKING, drops_thinking_pieces, "<|im_end|>"),
    "headers and a date (Llama 3)": Family(HEADERS, headers_pieces, "<|eot|>"),
    "model role (Gemma)": Family(MODEL_ROLE, model_role_pieces),
    "INST (Mistral)": Family(INST, inst_pieces, alternates=True),
    "tags without a prompt (Zephyr)": Family(TAGS, tags_pieces),
    "plain words": Family(PLAIN, plain_pieces),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<start>", "<end>", BOS, EOS]


def chat_tokenizer(
    template: str | None, *, eos: str = EOS, merges: Sequence[tuple[str, str]] = (), begin: bool = True
) -> PreTrainedTokenizerFast:
    """One token a byte, then merges, then the special tokens of all families; it puts `<s>` in front."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    # Llama 3's post-processor: the first part trims the spaces off the offsets.
    parts: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if begin:
        parts.append(
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
        )
    backend.post_processor = processors.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=BOS)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: chat_tokenizer(family.template, eos=family.eos) for name, family in FAMILIES.items()}
ENCODERS = {name: DocumentEncoder(tokenizer, 1000) for name, tokenizer in TOKENIZERS.items()}


def chat(
    *turns: str | Message,
    trained: Literal["all", "assistant"] = "assistant",
    where: str = "c.jsonl:1",
    context: Sequence[int] = (),
) -> Document:
    """A conversation from `role: content` texts; the messages at `context` are not trained."""
    messages = [
        dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) if isinstance(turn, str) else turn
        for turn in turns
    ]
    words = tuple(Segment(m["content"]) for m in messages if m["content"])
    return Document(where, words, where, conversation=Conversation(tuple(messages), (), trained, tuple(context)))


def expected(name: str, messages: Sequence[Message]) -> tuple[list[int], list[bool], tuple[int, ...]]:
    """Ids, trained ones and closing ids, each piece tokenised alone."""
    tokenizer, pieces = TOKENIZERS[name], FAMILIES[name].pieces(messages)
    if not "".join(text for text, _ in pieces).startswith(BOS):
        pieces = [(BOS, False), *pieces]
    ids: list[int] = []
    trained: list[bool] = []
    closed_behind = 0
    for text, answer in pieces:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        ids += tokens
        trained += [answer] * len(tokens)
        if answer:
            # The last token that is no white space, or anything behind it, may be the end-of-text token.
            closed_behind = len(ids) - len(tokens) + len(tokenizer(text.rstrip(), add_special_tokens=False).input_ids)
    answered = messages[-1]["role"] == "assistant"
    closed = tokenizer.eos_token_id in ids[max(closed_behind - 1, 0) :]
    return ids, trained, () if closed or not answered else (tokenizer.eos_token_id,)


def expected_with_context(name: str, document: Document) -> tuple[list[int], list[bool], tuple[int, ...]]:
    """As `expected`; every answer is one piece, and those of the context are not trained."""
    conversation = document.conversation
    assert conversation is not None
    tokenizer, messages, everything = TOKENIZERS[name], conversation.messages, conversation.trained == "all"
    # What a mark holds behind the end of a turn is no part of the answer where everything else is trained.
    pieces = (chatml_pieces if everything and name == "generation marks" else FAMILIES[name].pieces)(messages)
    if not "".join(text for text, _ in pieces).startswith(BOS):
        pieces = [(BOS, False), *pieces]
    answers = iter(index for index, m in enumerate(messages) if m["role"] == "assistant")
    ids: list[int] = []
    trained: list[bool] = []
    closed_behind, written = 0, ""
    for text, answer in pieces:
        place = next(answers) if answer else None
        counts = place not in conversation.context and (answer or everything)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        ids, trained, written = ids + tokens, trained + [counts] * len(tokens), written + text
        if answer and counts:
            closed_behind = len(tokenizer(written.rstrip(), add_special_tokens=False).input_ids)
    if everything:
        closed_behind = len(tokenizer(written.rstrip(), add_special_tokens=False).input_ids)
    last = len(messages) - 1
    answered = last not in conversation.context and (everything or messages[-1]["role"] == "assistant")
    closed = tokenizer.eos_token_id in ids[max(closed_behind - 1, 0) :]
    return ids, trained, () if closed or not answered else (tokenizer.eos_token_id,)


def labels(run: TokenRun) -> list[bool]:
    return np.broadcast_to(np.asarray(run.trained), run.ids.shape).tolist()


def check(name: str, document: Document) -> None:
    assert document.conversation is not None
    ids, trained, end = expected(name, document.conversation.messages)
    (run,) = ENCODERS[name].runs([document])
    assert run.ids.tolist() == ids
    assert labels(run) == trained
    assert (run.opens, run.document, run.end) == (True, 1, end)
    assert run.problems == (("missing_eos",) if end else ())


CASES = {
    "one turn": ["user: Hi", "assistant: Hello."],
    "many turns": ["user: Hi", "assistant: Hello.", "user: Why?", "assistant: Because.", "user: So", "assistant: Yes"],
    "question last": ["user: Hi", "assistant: Hello.", "user: Why?"],
    "the same twice": ["user: yes", "assistant: yes", "user: yes", "assistant: yes"],
    "white space around": ["user:  Hi ", "assistant:  \n two \n", "user: x\n", "assistant: \tlast \n\n"],
    "empty answer": ["user: Hi", "assistant: ", "user: Hm", "assistant: x"],
    "empty last answer": ["user: Hi", "assistant: "],
    "blank answer": ["user: Hi", "assistant: \n ", "user: Hm", "assistant: x"],
    "markers in the user's words": [
        "user: <|im_end|>\n<|im_start|>assistant\nx</s> <|assistant|>\n[/INST] ### assistant:\n",
        "assistant: x",
    ],
    "markers in the answer": [
        "user: x",
        "assistant: <|im_end|>\n<|im_start|>user\nx</s> [INST] q [/INST] <|user|>\n### user:\n<end>",
        "user: y",
        "assistant: </s>",
    ],
    "thinking": [
        "user: a",
        "assistant: <think>\nlong\n</think>\n\nfirst",
        "user: b",
        "assistant: <think>\nhm\n</think>\n\nsecond",
    ],
    "thinking without words": ["user: a", "assistant: <think>hm</think>", "user: b", "assistant: <think>hm</think>"],
    "answer is the prompt": ["user: assistant", "assistant: assistant", "user: user", "assistant: assistant\n"],
    "digits and other scripts": ["user: 1 2", "assistant: 日本語 🙂 é 0", "user: 0", "assistant: é"],
}
FREE_CASES = {
    "system": ["system: Be kind.", "user: Hi", "assistant: Hello."],
    "answers in a row": ["user: Hi", "assistant: one", "assistant: two", "assistant: one"],
    "answers in a row, an empty one": ["user: Hi", "assistant: ", "assistant: hi", "assistant: "],
    "answer first": ["assistant: Welcome", "user: Hi", "assistant: Hello."],
    "no answer": ["system: x", "user: Hi"],
}


PAIRS = [
    (name, case) for name, family in FAMILIES.items() for case in (CASES if family.alternates else CASES | FREE_CASES)
]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_tokens_and_trained_ones_of_every_family(name: str, case: str) -> None:
    check(name, chat(*(CASES | FREE_CASES)[case]))


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_tokens_are_those_of_apply_chat_template(name: str, case: str) -> None:
    document = chat(*(CASES | FREE_CASES)[case])
    assert document.conversation is not None
    (run,) = ENCODERS[name].runs([document])
    theirs = TOKENIZERS[name].apply_chat_template(list(document.conversation.messages), return_dict=False)
    prefix = [] if theirs[0] == TOKENIZERS[name].bos_token_id else [TOKENIZERS[name].bos_token_id]
    assert run.ids.tolist() == prefix + theirs


WORDS = ["a", "yes", " ", "\n", "\n\n", "é", "7", "assistant\n", "user"]
MARKERS = ["</think>", "<think>", "<think>\nhm\n</think>\n\n", "<|im_end|>", "<|im_start|>", "<|assistant|>\n"]
MARKERS += ["[/INST]", "</s>", "<s>", "<|eot|>", "<end>", "### user:\n"]
ATOMS = st.sampled_from(WORDS + MARKERS)
CONTENTS = st.lists(ATOMS, max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, alternates: bool) -> list[str]:
    """Turns of random roles, or of alternating ones."""
    contents = draw(st.lists(CONTENTS, min_size=1, max_size=6))
    if alternates:
        roles = itertools.cycle(["user", "assistant"])
        return [f"{next(roles)}: {content}" for content in contents]
    first = draw(st.sampled_from(["system", "user"]))
    rest = draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=len(contents), max_size=len(contents)))
    return [f"{role}: {content}" for role, content in zip([first, *rest], contents, strict=False)]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_conversation_trains_the_answers_and_their_ends(name: str, data: st.DataObject) -> None:
    check(name, chat(*data.draw(conversations(FAMILIES[name].alternates))))


@pytest.mark.parametrize("trained", ["assistant", "all"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_answers_of_the_context_are_not_trained(
    name: str, trained: Literal["all", "assistant"], data: st.DataObject
) -> None:
    turns = data.draw(conversations(FAMILIES[name].alternates))
    answers = [index for index, turn in enumerate(turns) if turn.startswith("assistant: ")]
    context = [index for index in answers if data.draw(st.booleans())]
    document = chat(*turns, trained=trained, context=context)
    (run,) = ENCODERS[name].runs([document])
    assert (run.ids.tolist(), labels(run), run.end) == expected_with_context(name, document)
    assert run.problems == (("missing_eos",) if run.end else ())


def test_nothing_of_an_untrained_answer_is_trained_where_all_else_is() -> None:
    """A token that begins in front of it is not, as the space before a word; what it ends in is not either."""
    tokenizer = chat_tokenizer(INST, merges=MERGES)
    (run,) = DocumentEncoder(tokenizer, 1000).runs([chat("user: Hi", "assistant: an", trained="all", context=[1])])
    tokens = tokenizer.convert_ids_to_tokens(run.ids.tolist())
    assert [token for token, label in zip(tokens, labels(run), strict=True) if not label] == ["Ġan", EOS]
    assert (run.end, run.problems) == ((), ()), "no end-of-text token is trained behind an answer that is not"


def test_context_among_tool_calls() -> None:
    call = {"role": "assistant", "content": "Hm.", "tool_calls": [{"name": "f"}]}
    turns = ["user: x", call, "tool: 2", "assistant: Two."]
    encoder = DocumentEncoder(chat_tokenizer(CALLS, eos="<|im_end|>"), 1000)
    found = [trained_texts(encoder, next(encoder.runs([chat(*turns, context=context)]))) for context in ([1], [3])]
    assert found == [["Two.<|im_end|>"], ['Hm.\n<call>{"name": "f"}</call><|im_end|>']]


def test_one_mark_around_trained_and_untrained_answers_is_refused() -> None:
    template = "{% generation %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endgeneration %}"
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    with pytest.raises(
        DataError, match=r"^c\.jsonl:1: .* weight 0, .* hold one answer alone; .* leave out the weights"
    ):
        list(encoder.runs([chat("assistant: a", "assistant: b", context=[0])]))
    (run,) = encoder.runs([chat("assistant: a", "assistant: b", context=[0, 1])])
    assert not any(labels(run))
    silent = DocumentEncoder(chat_tokenizer(MARKED.replace("'assistant'", "'user'")), 1000)
    with pytest.raises(DataError, match="hold one answer alone"):
        list(silent.runs([chat("user: a", "assistant: b", "assistant: c", context=[1])]))


def test_a_mark_around_an_answer_without_words_is_that_answers() -> None:
    answer = "{% generation %}{{ m.content }}\n{% endgeneration %}"
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}? {% endif %}{% endfor %}"
    encoder = DocumentEncoder(chat_tokenizer(template), 1000)
    turns = ["user: a", "assistant: ", "user: b", "assistant: hi"]
    found = [trained_texts(encoder, next(encoder.runs([chat(*turns, context=place)]))) for place in ([1], [3])]
    assert found == [["hi\n"], ["\n"]]


def test_untrained_answer_that_cannot_be_found_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}"
    encoder = DocumentEncoder(chat_tokenizer(template), 1000)
    with pytest.raises(DataError, match=r"^c\.jsonl:1: messages\[1\]: .* cannot be found .* leave out the weights"):
        list(encoder.runs([chat("user: x", "assistant: hello", trained="all", context=[1])]))
    with pytest.raises(DataError, match=r"messages\[2\]: .* cannot be found .* that marks answers with"):
        list(encoder.runs([chat("assistant: x", "user: y", "assistant: hello", context=[0])]))  # without weights too


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    characters=st.integers(1, 200),
    pieces=st.integers(1, 4),
)
def test_batches_change_nothing(data: st.DataObject, characters: int, pieces: int) -> None:
    turns = data.draw(st.lists(conversations(False), min_size=1, max_size=5))
    documents = [chat(*turn, where=f"c.jsonl:{index}") for index, turn in enumerate(turns)]
    documents += [Document("t", (Segment("some text"), Segment("more", trained=False)), "t.jsonl:1")]
    encoder = ENCODERS["chatml"]

    def read() -> list[tuple[object, ...]]:
        runs = encoder.runs(documents)
        return [(run.ids.tolist(), labels(run), run.opens, run.document, run.end, run.problems) for run in runs]

    whole = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "BATCH_CHARACTERS", characters)
        patch.setattr(tokenization, "BATCH_PIECES", pieces)
        assert read() == whole


@pytest.mark.parametrize("template", [CHATML, DROPS_THINKING, MODEL_ROLE])
def test_a_long_chat_is_rendered_a_few_times_only(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once or twice for each answer, which would take the square of the turns."""
    messages = [{"role": role, "content": f"{number}."} for number in range(200) for role in ("user", "assistant")]
    rendered: list[int] = []
    original = chat_template_utils.render_jinja_template

    def counting(conversations: list[list[Message]], **rest: Any) -> Any:
        rendered.extend(map(len, conversations))
        return original(conversations, **rest)

    monkeypatch.setattr(chat_template_utils, "render_jinja_template", counting)
    found = ChatRenderer(chat_tokenizer(template), None).render(Conversation(tuple(messages), (), "assistant"), "here")
    answers = [found.text[start:end] for start, end in found.spans or ()]
    assert [re.sub(r"<.*?>|\n", "", answer) for answer in answers] == [f"{number}." for number in range(200)]
    assert sum(rendered) < 10 * len(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_trained_when_asked(name: str) -> None:
    document = chat("user: Hi", "assistant: Hello.", trained="all")
    assert document.conversation is not None
    ids, _, end = expected(name, document.conversation.messages)
    (run,) = ENCODERS[name].runs([document])
    assert (run.ids.tolist(), run.trained, run.end) == (ids, True, end)
    assert run.problems == (("missing_eos",) if end else ())


def test_prefix_of_a_tokenizer_without_the_habit_is_not_added() -> None:
    encoder = DocumentEncoder(chat_tokenizer(CHATML, begin=False), 1000)
    (run,) = encoder.runs([chat("user: Hi", "assistant: Hello.")])
    assert encoder.frame.prefix == ()
    assert run.ids.size == expected_size("chatml", ["Hi", "Hello."]) - 1


def expected_size(name: str, contents: list[str]) -> int:
    roles = itertools.cycle(["user", "assistant"])
    return len(expected(name, [{"role": next(roles), "content": content} for content in contents])[0])


def test_documents_are_grouped_with_their_missing_end() -> None:
    runs = ENCODERS["model role (Gemma)"].runs([chat("user: Hi", "assistant: yo")] * 2)
    eos = TOKENIZERS["model role (Gemma)"].eos_token_id
    for ids, trained, opens in group_documents(runs):
        assert (int(ids[-1]), bool(trained[-1]), opens) == (eos, True, True)


MERGES = [("a", "n"), ("!", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "an"), ("Ċ", "Ċ")]


def test_tokens_across_a_border_are_trained() -> None:
    """One trained character is enough: in ` an` of `[/INST] an`, in the line ends before and behind `an!`."""
    inst = DocumentEncoder(chat_tokenizer(INST, merges=MERGES), 1000)
    (run,) = inst.runs([chat("user: Hi", "assistant: an")])
    tokens = chat_tokenizer(INST, merges=MERGES).convert_ids_to_tokens(run.ids.tolist())
    assert [token for token, trained in zip(tokens, labels(run), strict=True) if trained] == ["Ġan", EOS]
    plain = chat_tokenizer(PLAIN, merges=MERGES)
    (run,) = DocumentEncoder(plain, 1000).runs([chat("user: Hi", "assistant: \nan!", "user: Hi")])
    tokens = plain.convert_ids_to_tokens(run.ids.tolist())
    trained = [index for index, label in enumerate(labels(run)) if label]
    assert tokens[trained[0] : trained[-1] + 1] == ["ĊĊ", "an", "!Ċ"]
    assert [*range(trained[0], trained[-1] + 1)] == trained


def test_offsets_trimmed_by_the_tokenizer_shift_no_border() -> None:
    tokenizer = chat_tokenizer(PLAIN, merges=MERGES)
    (run,) = DocumentEncoder(tokenizer, 1000).runs([chat("user: Hi", "assistant:    an  ", "user: x")])
    tokens = tokenizer.convert_ids_to_tokens(run.ids.tolist())
    trained = [token for token, label in zip(tokens, labels(run), strict=True) if label]
    assert trained == ["ĊĠ", "Ġ", "Ġan", "Ġ", "Ġ"]


def test_sentencepiece_like_tokens_keep_their_borders() -> None:
    """The leading space that such a tokenizer invents goes with the character behind it."""
    pieces = ["<unk>", "▁", *"aHijlnotuserx:#\n", "▁an", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (run,) = DocumentEncoder(tokenizer, 1000, template).runs([chat("user: é", "assistant: né")])
    tokens = tokenizer.convert_ids_to_tokens(run.ids.tolist())
    trained = [token for token, label in zip(tokens, labels(run), strict=True) if label]
    assert trained == ["▁", "n", "<0xC3>", "<0xA9>", "<|im_end|>"]


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<call>' + (c | tojson) }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", [None, "", "Let me see.", " <|im_end|> "])
def test_tool_calls_belong_to_the_answer(content: str | None) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": [{"name": "add", "arguments": {"a": "<|im_end|>"}}]}
    messages = ["user: 1+1", call, "tool: 2", "assistant: Two."]
    encoder = DocumentEncoder(chat_tokenizer(CALLS, eos="<|im_end|>"), 1000)
    (run,) = encoder.runs([chat(*messages)])
    written = f'{content or ""}\n<call>{{"name": "add", "arguments": {{"a": "<|im_end|>"}}}}</call><|im_end|>'
    assert trained_texts(encoder, run) == [written, "Two.<|im_end|>"]


def trained_texts(encoder: DocumentEncoder, run: TokenRun) -> list[str]:
    """Decoded stretches of trained tokens."""
    stretches = itertools.groupby(zip(run.ids.tolist(), labels(run), strict=True), key=lambda pair: pair[1])
    decode = chat_tokenizer(None).decode
    return [decode([token for token, _ in pairs]) for trained, pairs in stretches if trained]


def test_tool_calls_with_a_token_of_their_own_behind_them() -> None:
    template = CALLS.replace("<|im_end|>", "{{ '<|eot|>' if m.tool_calls else '<|im_end|>' }}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    (run,) = encoder.runs([chat("user: x", call, "tool: 2", "assistant: Two.")])
    assert trained_texts(encoder, run) == ['\n<call>{"name": "f"}</call><|eot|>', "Two.<|im_end|>"]


def test_reasoning_in_a_field_of_its_own_is_trained_where_the_template_writes_it() -> None:
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
    )
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    (run,) = encoder.runs([chat("user: x", answer)])
    assert trained_texts(encoder, run) == ["<think>2+2</think>4<|im_end|>"]


def test_generation_prompt_with_an_open_thought_is_not_trained() -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    (run,) = encoder.runs([chat("user: x", "assistant: plain", "user: y", "assistant: <think>\nhm</think>4")])
    assert trained_texts(encoder, run) == ["plain<|im_end|>", "hm</think>4<|im_end|>"]


def test_template_that_writes_nothing_for_an_empty_answer() -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content %}")
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    (run,) = encoder.runs([chat("user: x", "assistant: ", "user: y", "assistant: hi", "assistant: ")])
    assert trained_texts(encoder, run) == ["hi<|im_end|>"]


def test_template_that_changes_the_words() -> None:
    template = CHATML.replace("m.content", "m.content | upper | replace('A', 'bbb')")
    encoder = DocumentEncoder(chat_tokenizer(template, eos="<|im_end|>"), 1000)
    (run,) = encoder.runs([chat("user: aa", "assistant: banana", "user: a", "assistant: a")])
    assert trained_texts(encoder, run) == ["BbbbNbbbNbbb<|im_end|>", "bbb<|im_end|>"]


def test_tokens_that_end_no_turn_are_not_trained() -> None:
    begins = DocumentEncoder(chat_tokenizer("{% for m in messages %}<s>{{ m.content }}{% endfor %}"), 1000)
    (run,) = begins.runs([chat("user: x", "assistant: hi", "user: y")])
    assert trained_texts(begins, run) == ["hi"]
    tokenizer = chat_tokenizer(PLAIN)
    tokenizer.add_tokens(["\n\n"])
    blank = DocumentEncoder(tokenizer, 1000)
    (run,) = blank.runs([chat("user: x", "assistant: hi", "user: y")])
    assert tokenizer.convert_tokens_to_ids("\n\n") in run.ids
    assert sum(labels(run)) == len("hi")


def test_answers_in_another_order_are_refused() -> None:
    encoder = DocumentEncoder(chat_tokenizer("{% for m in messages | reverse %}{{ m.content }};{% endfor %}"), 1000)
    with pytest.raises(DataError, match=r"messages\[2\]: this answer cannot be found"):
        list(encoder.runs([chat("assistant: one", "user: x", "assistant: two")]))


def test_tools_and_a_given_template_are_used() -> None:
    template = "{{ tools | tojson }}" + CHATML
    encoder = DocumentEncoder(chat_tokenizer(CHATML, eos="<|im_end|>"), 1000, template)
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    document = Document("k", (), "c:1", conversation=Conversation(messages, ({"name": "add"},), "assistant"))
    (run,) = encoder.runs([document])
    text = chat_tokenizer(None).decode(run.ids.tolist())
    assert text.startswith(BOS + '[{"name": "add"}]<|im_start|>user')
    assert trained_texts(encoder, run) == ["y<|im_end|>"]


def test_date_that_changes_between_two_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        ticks = iter(["Monday", "Tuesday", *["Wednesday"] * 50])

        def strftime(self, format: str) -> str:
            return next(Clock.ticks)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    template = "{{ strftime_now('%A') }}" + CHATML.replace("m.content", "m.content.strip()")
    renderer = ChatRenderer(chat_tokenizer(template, eos="<|im_end|>"), None)
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>"})
    rendered = renderer.render(Conversation(messages, trained="assistant"), "c:1")
    assert rendered.spans is not None
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["<think><|im_end|>"]


def test_answers_that_cannot_be_found_are_refused_with_the_way_out() -> None:
    template = "{% for m in messages %}{{ m.content | length }} {{ m.content }}<|im_end|>{% endfor %}"
    encoder = DocumentEncoder(chat_tokenizer(template), 1000)
    with pytest.raises(DataError, match=r"c\.jsonl:7: messages\[1\]: .* data\.chat_template .*\{% generation %\}"):
        list(encoder.runs([chat("user: x", "assistant: hello", where="c.jsonl:7")]))


def test_template_error_names_the_row() -> None:
    encoder = ENCODERS["INST (Mistral)"]
    with pytest.raises(DataError, match=r"^c\.jsonl:9: the chat template refuses .*: roles must alternate;"):
        list(encoder.runs([chat("user: a", "assistant: b"), chat("user: a", "user: b", where="c.jsonl:9")]))
    numbers = DocumentEncoder(chat_tokenizer("{{ messages[0].content + 1 }}"), 1000)
    with pytest.raises(DataError, match=r"c\.jsonl:1: .*TypeError: can only concatenate str"):
        list(numbers.runs([chat("user: a", trained="all")]))


def test_unsafe_template_is_stopped_by_the_sandbox() -> None:
    encoder = DocumentEncoder(chat_tokenizer("{{ messages.__class__.__mro__ }}"), 1000)
    with pytest.raises(DataError, match=r"c\.jsonl:1: .*unsafe"):
        list(encoder.runs([chat("user: a", "assistant: b")]))


def test_no_template_anywhere_names_the_key() -> None:
    encoder = DocumentEncoder(chat_tokenizer(None), 1000)
    with pytest.raises(ConfigError) as caught:
        list(encoder.runs([chat("user: a", "assistant: b")]))
    (problem,) = caught.value.problems
    assert problem.key == "data.chat_template"
    assert "no chat template" in problem.message
    assert problem.suggestion is not None and ".jinja" in problem.suggestion


def test_template_that_is_no_jinja() -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template: the chat template .* line 2: "):
        DocumentEncoder(chat_tokenizer(CHATML), 1000, "\n{% for %}")
    encoder = DocumentEncoder(chat_tokenizer("{{ x | no_such_filter }}"), 1000)
    assert list(encoder.runs([])) == []
    with pytest.raises(ConfigError, match=r"tokenizer's own chat template .*no_such_filter"):
        list(encoder.runs([chat("user: a", "assistant: b")]))


def test_marks_that_transformers_miscounts_are_refused() -> None:
    inner = "{% generation %}{{ m.content }}{% endgeneration %}"
    loop = "{% for m in messages %}{{ say(m) }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"data\.chat_template: .* inside a macro"):
        DocumentEncoder(chat_tokenizer(None), 1000, f"{{% macro say(m) %}}words {inner}{{% endmacro %}}{loop}")
    with pytest.raises(ConfigError, match="inside a macro"):
        DocumentEncoder(chat_tokenizer(None), 1000, f"{{%- set x -%}}{inner}{{% endset %}}{loop}")
    harmless = "{% set y = 1 %}{% macro say(m) %}{{ m }}{% endmacro %}"
    DocumentEncoder(chat_tokenizer(None), 1000, f"{harmless}{{% for m in messages %}}{inner}{{% endfor %}}")


def test_template_from_a_file_and_as_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML + "é", encoding="utf-8")
    assert load_chat_template(str(file)) == CHATML + "é"
    assert load_chat_template(CHATML) == CHATML
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*none\.jinja: cannot be read: No such file"):
        load_chat_template(str(tmp_path / "none.jinja"))
    file.write_bytes(b"{{ \xff }}")
    with pytest.raises(ConfigError, match=r"mine\.jinja: byte 3 is not UTF-8"):
        load_chat_template(str(file))
    with pytest.raises(ConfigError, match=re.escape("no chat template: nothing in it is filled in, 'chatml'")):
        load_chat_template("chatml")
