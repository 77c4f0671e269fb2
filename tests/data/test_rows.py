from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.base import Document
from truthgpt.data.rows import STREAM_CHECK_ROWS, BadRow, BadRowPolicy, RowFields, RowReader, json_type
from truthgpt.errors import DataError

STRICT = BadRowPolicy("error", 0.0)


def fields(
    format: Literal["text", "prompt_completion", "chat"],
    train_on: Literal["all", "completion", "assistant"] = "all",
) -> RowFields:
    return RowFields(format, "text", "prompt", "completion", "messages", train_on)


def chat_reader(train_on: Literal["all", "assistant"] = "all") -> RowReader:
    return RowReader(fields("chat", train_on), STRICT)


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}


def test_used_fields() -> None:
    assert fields("text").used() == ("text",)
    assert fields("prompt_completion").used() == ("prompt", "completion")
    assert fields("chat").used() == ("messages",)


def test_text_is_one_trained_segment_and_nothing_else() -> None:
    document = RowReader(fields("text"), STRICT).document({"text": " a\n", "other": 1}, "here")
    assert document is not None
    assert [(s.text, s.trained) for s in document.segments] == [(" a\n", True)]
    assert (document.where, document.continues, document.conversation) == ("here", False, None)


@pytest.mark.parametrize(("train_on", "prompt_trained"), [("all", True), ("completion", False)])
def test_prompt_and_completion(train_on: Literal["all", "completion"], prompt_trained: bool) -> None:
    reader = RowReader(fields("prompt_completion", train_on), STRICT)
    document = reader.document({"completion": " four", "prompt": "2+2="}, "here")
    assert document is not None
    assert [(s.text, s.trained) for s in document.segments] == [("2+2=", prompt_trained), (" four", True)]
    assert reader.document({"completion": " \n", "prompt": "2+2="}, "here") is None
    assert (reader.tally.usable, reader.tally.empty, reader.tally.rows) == (1, 1, 2)


@pytest.mark.parametrize(("train_on", "trained"), [("all", [True, True]), ("assistant", [False, True])])
def test_chat(train_on: Literal["all", "assistant"], trained: list[bool]) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    document = chat_reader(train_on).document({"messages": [USER, CALL, ANSWER], "tools": [tool]}, "here")
    assert document is not None
    assert document.conversation is not None
    assert document.conversation.messages == (USER, CALL, ANSWER)
    assert document.conversation.tools == (tool,)
    assert document.conversation.trained == train_on
    assert [s.text for s in document.segments] == ["hi", "hello"]
    assert [s.trained for s in document.segments] == trained


def test_nulls_beside_the_content_are_as_if_absent() -> None:
    message = {**USER, "tool_calls": None, "name": None}
    document = chat_reader().document({"messages": [message], "tools": None}, "here")
    assert document is not None
    assert document.conversation is not None
    assert document.conversation.messages == (USER,)
    assert document.key == chat_reader().document({"messages": [USER]}, "there").key  # type: ignore[union-attr]


def test_content_may_be_missing_beside_tool_calls() -> None:
    call = {key: value for key, value in CALL.items() if key != "content"}
    document = chat_reader("assistant").document({"messages": [USER, call]}, "here")
    assert document is not None
    assert document.conversation is not None
    assert document.conversation.messages == (USER, CALL)


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_a_conversation_without_trained_text_is_empty(train_on: Literal["all", "assistant"]) -> None:
    reader = chat_reader(train_on)
    blank = {"role": "assistant", "content": " "}
    assert (reader.document({"messages": [USER, blank]}, "here") is None) == (train_on == "assistant")
    assert reader.document({"messages": [{**USER, "content": ""}, blank]}, "here") is None
    assert reader.document({"messages": [USER, CALL]}, "here") is not None


def weighted(*weights: Any, train_on: Literal["all", "assistant"] = "assistant") -> Document | None:
    """The document of a chat with an answer a weight; None: an answer without one."""
    answers = [{**ANSWER, "content": f"answer {number}", "weight": w} for number, w in enumerate(weights)]
    messages = [message for answer in answers for message in (USER, answer)]
    return chat_reader(train_on).document({"messages": messages}, "here")


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_an_answer_of_weight_0_is_context(train_on: Literal["all", "assistant"]) -> None:
    found = weighted(0, 1, None, 0.0, 1.0, train_on=train_on)
    assert found is not None and found.conversation is not None
    assert (found.conversation.context, found.conversation.trained) == ((1, 7), train_on)
    asked = train_on == "all"
    assert [s.trained for s in found.segments] == [asked, False, asked, True, asked, True, asked, False, asked, True]
    assert not any("weight" in message for message in found.conversation.messages), "a template sees none"


def test_weight_1_is_as_no_weight_and_no_weight_moves_a_chat_across_the_split() -> None:
    plain, ones, some = weighted(None, None), weighted(1, 1.0), weighted(0, 1)
    assert plain is not None and some is not None
    assert ones == plain
    assert some.key == plain.key and some.conversation != plain.conversation


@pytest.mark.parametrize("weights", [(0,), (0, 0.0)])
def test_a_chat_with_nothing_left_to_train_is_left_out_and_counted(weights: tuple[float, ...]) -> None:
    assert weighted(*weights) is None
    assert weighted(*weights, train_on="all") is not None, "the questions are trained"
    reader = chat_reader("assistant")
    blank = {**ANSWER, "content": " "}
    assert reader.document({"messages": [USER, {**ANSWER, "weight": 0}, USER, blank]}, "here") is None
    assert (reader.tally.empty, reader.tally.bad) == (1, 0)
    with pytest.raises(DataError, match=r"1 rows, 1 without text to train on \(blank, or of weight 0\); set"):
        reader.finish("rows")
    call = {**CALL, "weight": 0}
    assert chat_reader("all").document({"messages": [call]}, "here") is None


@pytest.mark.parametrize("train_on", ["all", "assistant"])
def test_a_weight_of_another_role_changes_nothing(train_on: Literal["all", "assistant"]) -> None:
    plain = chat_reader(train_on).document({"messages": [USER, ANSWER]}, "here")
    assert plain is not None and plain.conversation is not None and plain.conversation.context == ()
    assert [s.trained for s in plain.segments] == [train_on == "all", True]
    for weight in (0, 1, 0.5, "much"):
        document = chat_reader(train_on).document({"messages": [{**USER, "weight": weight}, ANSWER]}, "here")
        assert document == plain, "its side of the split and what a template sees included"


BAD_WEIGHTS = [
    (0.5, "0.5"),
    (-1, "-1"),
    (2, "2"),
    (float("nan"), "nan"),
    (True, "a boolean"),
    (False, "a boolean"),
    ("0", "a string"),
    ([0], "a list"),
]


@pytest.mark.parametrize("train_on", ["all", "assistant"])
@pytest.mark.parametrize(("weight", "found"), BAD_WEIGHTS)
def test_another_weight_is_refused(train_on: Literal["all", "assistant"], weight: Any, found: str) -> None:
    with pytest.raises(BadRow) as error:
        weighted(1, weight, train_on=train_on)
    assert str(error.value) == f"messages[3].weight must be 0 (context, not trained) or 1 (trained), found {found}"
    assert error.value.field == "messages"


BAD_CHATS: list[tuple[Any, str, str | None]] = [
    ({"text": "a"}, r"no field 'messages', the row has 'text' \(set data.messages_field\)", None),
    ({"messages": "hi"}, "field 'messages' must be a list of messages, found a string", "messages"),
    ({"messages": None}, "must be a list of messages, found null", "messages"),
    ({"messages": []}, "must hold at least one message, found an empty list", "messages"),
    ({"messages": [USER, "hi"]}, r"messages\[1\] must be an object with 'role' and 'content', found a str", "messages"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content', only 'role'", "messages"),
    ({"messages": [{"content": "a"}]}, r"messages\[0\] has no 'role', only 'content'", "messages"),
    ({"messages": [{}]}, r"messages\[0\] has no 'role', only nothing", "messages"),
    ({"messages": [{**USER, "role": 3}]}, r"messages\[0\].role must be a string, found a number", "messages"),
    ({"messages": [{**USER, "content": None}]}, r"content must be a string \(null only with tool_calls\)", "messages"),
    ({"messages": [{**CALL, "tool_calls": []}]}, r"content must be a string \(null only with tool_calls\)", "messages"),
    ({"messages": [{**USER, "content": [1]}]}, r"messages\[0\].content must be a string, found a list", "messages"),
    ({"messages": [{**CALL, "tool_calls": {}}]}, r"messages\[0\].tool_calls must be a list, found an obj", "messages"),
    (
        {"messages": [{"from": "human", "value": "a"}]},
        r"messages\[0\] has 'from' and 'value'; .*rename 'from' to 'role' .*and 'value' to 'content'",
        "messages",
    ),
    ({"conversations": [{"from": "human", "value": "a"}]}, "the row has 'conversations' .set data.messages_", None),
    ({"messages": [USER], "tools": "f"}, "field 'tools' must be a list of objects, found a string", "tools"),
    ({"messages": [USER], "tools": [3]}, r"tools\[0\] must be an object, found a number", "tools"),
]


@pytest.mark.parametrize(("row", "reason", "field"), BAD_CHATS)
def test_bad_chat(row: dict[str, Any], reason: str, field: str | None) -> None:
    with pytest.raises(BadRow, match=reason) as error:
        chat_reader().document(row, "here")
    assert error.value.field == field


def test_training_on_the_assistant_needs_one() -> None:
    assert chat_reader("all").document({"messages": [USER]}, "here") is not None
    with pytest.raises(BadRow, match="no message with role 'assistant', which train_on: assistant needs"):
        chat_reader("assistant").document({"messages": [USER]}, "here")


def test_surrogates_in_a_chat_however_deep() -> None:
    reader = chat_reader()
    broken = {"role": "user", "content": "a\ud83d \ud83d\ude00", "tool_calls": [{"\udc00": ["\ud800"]}]}
    document = reader.document({"messages": [broken]}, "here")
    assert document is not None
    assert document.conversation is not None
    assert document.text == "a\ufffd \U0001f600"
    assert document.conversation.messages[0]["tool_calls"] == [{"\ufffd": ["\ufffd"]}]
    assert reader.tally.surrogates == 1


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=2, max_size=12))
def test_keys_are_equal_exactly_when_contents_are(pairs: list[tuple[str, str]]) -> None:
    reader = RowReader(fields("prompt_completion"), STRICT)
    keys: dict[tuple[str, str], str] = {}
    for prompt, completion in pairs:
        document = reader.document({"prompt": prompt, "completion": completion + "."}, "here")
        assert document is not None
        assert keys.setdefault((prompt, completion), document.key) == document.key
    assert len(set(keys.values())) == len(keys)


def test_chat_key_sees_roles_and_tools() -> None:
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "role": "system"}, ANSWER]},
        {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
        {"messages": [{"role": "user", "content": "hihello"}]},
    ]
    documents = [chat_reader().document(row, "here") for row in rows]
    assert len({document.key for document in documents if document is not None}) == len(rows)


def test_chat_key_does_not_see_the_order_of_keys() -> None:
    messages = [{"role": "user", "name": "Ada", "content": "hi"}, {"name": "Ada", "content": "hi", "role": "user"}]
    documents = [chat_reader().document({"messages": [message]}, "here") for message in messages]
    assert len({document.key for document in documents if document is not None}) == 1


def test_accept_ends_the_run_with_place_reason_and_excerpt() -> None:
    reader = RowReader(fields("text"), STRICT)
    with pytest.raises(DataError) as error:
        reader.accept({"text": ["é" * 100]}, "set[train] row 17")
    message = str(error.value)
    assert message.startswith("set[train] row 17: field 'text' must be a string, found a list: '{\"text\": [\"éé")
    assert message.endswith("correct the row, or set data.on_bad_row: skip")
    assert "é" * 49 in message
    assert "é" * 51 not in message


def test_skipped_rows_are_counted_capped_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = RowReader(fields("text"), BadRowPolicy("skip", 0.5))
    rows = [{"text": "a"}, {"text": 1}, {"text": "  "}, {}, {"text": "b\ud800"}]
    documents = [reader.accept(row, f"row {index}") for index, row in enumerate(rows)]
    assert [document and document.text for document in documents] == ["a", None, None, None, "b\ufffd"]
    with caplog.at_level(logging.INFO):
        reader.finish("rows", report=False)
        assert caplog.messages == []
        reader.finish("rows")
    assert caplog.messages == [
        "rows: skipped 2 malformed of 5 rows; the first: row 1: field 'text' must be a string, found a number: "
        "'{\"text\": 1}'",
        "rows: left out 1 of 5 rows without text to train on",
        "rows: unpaired surrogates in 1 texts became U+FFFD",
    ]
    reader.accept({}, "row 5")
    reader.finish("rows", report=False)  # 3 of 6 is not more than half
    reader.accept({}, "row 6")
    with pytest.raises(DataError, match=r"rows: 4 of 7 rows are malformed, more than data.max_bad_fraction 0.5.*row 1"):
        reader.finish("rows")


def test_no_usable_row() -> None:
    reader = RowReader(fields("text"), STRICT)
    reader.accept({"text": ""}, "row 0")
    with pytest.raises(DataError, match="0 usable documents in rows: 1 rows, 1 without text"):
        reader.finish("rows")


def test_a_stream_is_judged_while_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    reader = RowReader(fields("text"), BadRowPolicy("skip", 0.1), whole_pass=False)
    for index in range(STREAM_CHECK_ROWS - 1):
        reader.accept({} if index % 4 == 0 else {"text": "a"}, f"row {index}")
    assert [message[:60] for message in caplog.messages] == [
        "skipped a malformed row, further ones are only counted: row "
    ]
    with pytest.raises(DataError, match="251 of 1000 rows are malformed"):
        reader.accept({}, "row 999")


def test_a_stream_with_few_bad_rows_goes_on() -> None:
    reader = RowReader(fields("text"), BadRowPolicy("skip", 0.1), whole_pass=False)
    for index in range(3 * STREAM_CHECK_ROWS):
        reader.accept({} if index % 10 == 9 else {"text": "a"}, f"row {index}")
    assert reader.tally.bad == 300


def test_json_types() -> None:
    values = [None, True, 1, 2.5, "a", [], {}, b""]
    names = ["null", "a boolean", "a number", "a number", "a string", "a list", "an object", "a bytes"]
    assert [json_type(value) for value in values] == names
