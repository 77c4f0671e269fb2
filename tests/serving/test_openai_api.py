"""The API against OpenAI's own client, over a real connection, with an engine whose text is known."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from tests.serving.fake_engine import FakeEngine, expected_text
from tests.serving.server import RunningServer, serving, wait_until
from truthgpt.runtime.seeds import derive_seed
from truthgpt.serving.openai_requests import ChatRequest, CompletionRequest, SamplingFields

PROMPT = "Once upon"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


def ids(text: str) -> list[int]:
    return list(text.encode())


def chat_ids(*messages: tuple[str, str]) -> list[int]:
    return ids("".join(f"<{role}>{content}\n" for role, content in messages) + "<assistant>")


def test_models(server: RunningServer) -> None:
    [model] = server.client.models.list().data
    assert (model.id, model.object) == ("fake", "model")
    assert server.client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4': this server has 'fake'"):
        server.client.models.retrieve("gpt-4")


def test_completion(server: RunningServer) -> None:
    done = server.client.completions.create(model="fake", prompt=PROMPT, max_tokens=7, seed=3)
    assert done.object == "text_completion" and done.model == "fake" and done.id.startswith("cmpl-")
    [choice] = done.choices
    assert choice.text == expected_text(ids(PROMPT), 3, 7)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert done.usage is not None
    assert done.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 7,
        "total_tokens": len(PROMPT) + 7,
    }


def test_chat(server: RunningServer) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    done = server.client.chat.completions.create(model="fake", messages=messages, max_completion_tokens=5, seed=1)
    prompt = chat_ids(("system", "Be brief."), ("user", "Hello"))
    assert server.engine.submitted[-1][0] == prompt
    [choice] = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected_text(prompt, 1, 5))
    assert done.object == "chat.completion" and choice.finish_reason == "length"
    assert done.usage is not None and done.usage.prompt_tokens == len(prompt) and done.usage.completion_tokens == 5

    # What the answer was goes back as it came.
    again = [*messages, choice.message.model_dump(), {"role": "user", "content": "And?"}]
    server.client.chat.completions.create(model="fake", messages=again, max_tokens=5)
    answered = ("assistant", choice.message.content or "")
    assert server.engine.submitted[-1][0] == chat_ids(
        ("system", "Be brief."), ("user", "Hello"), answered, ("user", "And?")
    )


def test_streamed_completion(server: RunningServer) -> None:
    chunks = list(
        server.client.completions.create(
            model="fake", prompt=PROMPT, max_tokens=9, seed=2, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == expected_text(ids(PROMPT), 2, 9)
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in texts) and len({chunk.id for chunk in chunks}) == 1
    assert usage.choices == [] and usage.usage is not None and usage.usage.total_tokens == len(PROMPT) + 9


def test_streamed_chat(server: RunningServer) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hi"}], max_tokens=6, seed=2, stream=True
        )
    )
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(choice.delta.content or "" for choice in middle) == expected_text(chat_ids(("user", "Hi")), 2, 6)
    assert last.finish_reason == "length" and last.delta.content is None
    assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_the_events_of_a_stream(server: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stream": True, "seed": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, nothing = answer.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    documents = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(document["choices"][0]["text"] for document in documents) == expected_text([97], 0, 2)
    assert all("usage" not in document for document in documents)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(server: RunningServer, stream: bool) -> None:
    """Choice number 0 of a prompt is what a request for it alone gets; the others have seeds of their own."""
    body: dict[str, Any] = {"model": "fake", "prompt": ["ab", "c"], "n": 3, "max_tokens": 4, "seed": 11}
    seeds = [11, derive_seed(11, "choice", 1), derive_seed(11, "choice", 2)]
    expected = [expected_text(ids(prompt), seed, 4) for prompt in ("ab", "c") for seed in seeds]
    assert len(set(expected)) > 2
    if stream:
        texts: dict[int, str] = defaultdict(str)
        finished = []
        for chunk in server.client.completions.create(**body, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
            finished += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []
        assert [texts[index] for index in range(6)] == expected and sorted(finished) == list(range(6))
    else:
        done = server.client.completions.create(**body)
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == list(range(6))
        assert done.usage is not None and done.usage.prompt_tokens == 3 and done.usage.completion_tokens == 24


def test_without_a_seed_no_two_answers_have_the_same(server: RunningServer) -> None:
    for _ in range(2):
        server.client.completions.create(model="fake", prompt=["x", "x"], n=2, max_tokens=1)
    assert len({sampling.seed for _, sampling in server.engine.submitted[-8:]}) == 8


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8]]])
def test_prompts_as_token_ids(server: RunningServer, prompt: Any) -> None:
    done = server.client.completions.create(model="fake", prompt=prompt, max_tokens=3, seed=0)
    assert done.choices[0].text == expected_text([5, 6, 7], 0, 3)
    assert len(done.choices) == (2 if isinstance(prompt[0], list) else 1)


def test_stop_texts(server: RunningServer) -> None:
    whole = expected_text(ids(PROMPT), 0, 9)
    for stop in (whole[4], ["%", whole[4]]):
        done = server.client.completions.create(model="fake", prompt=PROMPT, max_tokens=9, seed=0, stop=stop)
        assert (done.choices[0].text, done.choices[0].finish_reason) == (whole[:4], "stop")


def test_sampling_reaches_the_engine(server: RunningServer) -> None:
    server.client.completions.create(
        model="fake",
        prompt="x",
        max_tokens=2,
        temperature=0.3,
        top_p=0.7,
        stop=["%", "$", "#", "@", "!"],
        extra_body={"top_k": 12, "repetition_penalty": 1.25},
    )
    sampling = server.engine.submitted[-1][1]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (2, 0.3, 0.7)
    assert (sampling.top_k, sampling.repetition_penalty) == (12, 1.25)
    assert sampling.stop == ("%", "$", "#", "@", "!")


def test_defaults_are_openais(server: RunningServer) -> None:
    """Temperature 1 and all tokens; 16 new tokens of a completion, and for a chat all that fit."""
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).raise_for_status()
    sampling = server.engine.submitted[-1][1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert sampling.max_new_tokens == 16 and sampling.stop == ()
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert server.engine.submitted[-1][1].max_new_tokens == 200 + 1 - len(chat_ids(("user", "Hi")))


def test_fields_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    server.client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=1,
        user="someone",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        logprobs=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        tools=[],
        response_format={"type": "text"},
    )
    server.client.completions.create(model="fake", prompt="x", max_tokens=1, best_of=1, echo=False, suffix=None)


UNSUPPORTED: list[tuple[str, Any]] = [
    ("logprobs", 3),
    ("logprobs", 0),
    ("best_of", 4),
    ("echo", True),
    ("suffix", " end"),
    ("frequency_penalty", 0.5),
    ("presence_penalty", -1),
    ("logit_bias", {"50256": -100}),
    ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}),
    ("reasoning_effort", "high"),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_fields_that_would_change_the_answer_are_refused(server: RunningServer, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field}: .* is not supported by this server") as caught:
        server.client.completions.create(model="fake", prompt="x", extra_body={field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")
    assert caught.value.type == "invalid_request_error"


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "prompt: this field is required"),
    ({"prompt": None}, "prompt", "prompt: give a text, a list of token ids, or a list of 1 to"),
    ({"prompt": []}, "prompt", "prompt: give a text"),
    ({"prompt": ["a", 1]}, "prompt", "prompt: give a text"),
    ({"prompt": [1, True]}, "prompt", "prompt: give a text"),
    ({"prompt": [-1]}, "prompt", "prompt: give a text"),
    ({"prompt": [[]]}, "prompt", "prompt: give a text"),
    ({"prompt": "a", "temprature": 1}, "temprature", "temprature: unknown field; did you mean temperature?"),
    ({"prompt": "a", "quality": 1}, "quality", "quality: unknown field; leave it out"),
    ({"prompt": "a", "messages": []}, "messages", "messages: unknown field"),
    ({"prompt": "a", "temperature": "0.5"}, "temperature", 'temperature: input should be a valid number, found "0.5"'),
    ({"prompt": "a", "temperature": -1}, "temperature", "temperature: input should be greater than or equal to 0"),
    ({"prompt": "a", "temperature": True}, "temperature", "temperature: input should be a valid number"),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p: input should be greater than 0, found 0"),
    ({"prompt": "a", "top_p": 1.5}, "top_p", "top_p: input should be less than or equal to 1"),
    ({"prompt": "a", "repetition_penalty": 1e-40}, "repetition_penalty", "repetition_penalty: input should be greater"),
    ({"prompt": "a", "repetition_penalty": 1e40}, "repetition_penalty", "repetition_penalty: input should be less"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens: input should be greater than or equal to 1"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "max_tokens: input should be a valid integer"),
    ({"prompt": "a", "n": 0}, "n", "n: input should be greater than or equal to 1"),
    ({"prompt": "a", "n": 129}, "n", "n: input should be less than or equal to 128"),
    ({"prompt": "a", "stop": [""]}, "stop", "stop: give a text or a list of at most 16 texts, none of them empty"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "stop: give a text"),
    ({"prompt": "a", "seed": 2**70}, "seed", "seed: "),
    ({"prompt": "a", "stream": "yes"}, "stream", "stream: input should be a valid boolean"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "stream_options: only a stream has them"),
    ({"prompt": "a", "stream_options": {"usage": 1}}, "stream_options.usage", "stream_options.usage: unknown field"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG)
def test_wrong_fields_are_named(server: RunningServer, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert error["message"].startswith(message), error["message"]
    assert set(error) == {"message", "type", "param", "code"}


USER = {"role": "user", "content": "Hi"}
WRONG_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "messages: list should have at least 1 item"),
    ({"messages": "Hi"}, "messages", "messages: input should be a valid list"),
    ({"messages": ["Hi"]}, "messages[0]", "messages[0]: input should be a valid dictionary"),
    ({"messages": [USER, {"role": "tool", "content": "1"}]}, "messages[1].role", "messages[1].role: input should be"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content: this field is required"),
    ({"messages": [{**USER, "content": None}]}, "messages[0].content", "messages[0].content: "),
    ({"messages": [{**USER, "name": "Bo"}]}, "messages[0].name", 'messages[0].name: "Bo" is not supported'),
    ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood", "messages[0].mood: unknown field"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        'messages[0].content: give a text or a list of parts {"type": "text", "text": ...}',
    ),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages", "messages: the model's chat template refuses"),
    ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, None, "max_tokens and max_completion_tokens"),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG_CHATS)
def test_wrong_messages_are_named(server: RunningServer, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(message), error["message"]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (CompletionRequest, {"prompt": [[""] * 1000]}),
        (CompletionRequest, {"prompt": "a", "stop": [""] * 1000}),
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{**USER, "content": [{}] * 1000}]}),
    ],
)
def test_a_long_list_of_mistakes_is_not_read_to_its_end(kind: type[SamplingFields], fields: dict[str, Any]) -> None:
    """Every client would wait for that: of 1.3 million, which a body can hold, eight seconds."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    assert caught.value.error_count() < 10


BODIES = [
    (b"", "the body is not JSON"),
    (b"{", "the body is not JSON"),
    (b"\xff\xfe{}", "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    (b'{"n": ' + b"1" * 5000 + b"}", "the body is not JSON"),
    (b"[]", "the body has to be a JSON object"),
    (b'"prompt"', "the body has to be a JSON object"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature: "),
    (b'{"prompt": "\\ud800"}', "the body is not JSON"),
    (b'{"prompt": "\\uD800", "x": 1}', "the body is not JSON"),
    (b'{"prompt": "a", "\\udc00": 1}', "the body is not JSON"),
    (b'{"prompt": "\xed\xa0\x80"}', "the body is not JSON"),
    ('{"prompt": "\\ud800"}'.encode("utf-16"), "the body is not JSON"),
]


@pytest.mark.parametrize(("body", "message"), BODIES)
def test_bodies_that_are_no_request(server: RunningServer, body: bytes, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_characters_beyond_the_basic_plane(server: RunningServer) -> None:
    body = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON).status_code == 200
    assert server.engine.submitted[-1][0] == ids("\U0001f600")


def test_a_body_has_a_type_and_a_size(server: RunningServer) -> None:
    """Browsers send other types than JSON to any site without asking it first."""
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}).status_code == 415
    large = httpx.post(url, content=b" " * (5 * 1024 * 1024), headers=JSON)
    assert large.status_code == 413 and "larger than" in large.json()["error"]["message"]


def test_unknown_models_and_paths(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.completions.create(model="gpt-4", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="the endpoints are GET /v1/models, POST /v1/completions"):
        server.client.embeddings.create(model="fake", input="x")
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_prompts_that_are_too_long(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt has 201 tokens and the model 200 positions") as caught:
        server.client.completions.create(model="fake", prompt="x" * 201)
    assert caught.value.code == "context_length_exceeded"
    message = (
        "the prompt has 100 tokens and 102 new ones are asked for, the model has 200 positions: ask for at most 101"
    )
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.completions.create(model="fake", prompt="x" * 100, max_tokens=102)
    server.client.completions.create(model="fake", prompt="x" * 100, max_tokens=101)
    server.client.completions.create(model="fake", prompt="x" * 200, max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(server: RunningServer, stream: bool) -> None:
    """All of a request or nothing, and as an HTTP status of a stream too."""
    before = len(server.engine.cancelled)
    with pytest.raises(openai.BadRequestError, match="token id 1000 is not in the model's vocabulary of 1000"):
        server.client.completions.create(model="fake", prompt=[[1], [1000]], stream=stream)
    wait_until(lambda: len(server.engine.cancelled) == before + 1)


def test_an_empty_prompt_begins_a_new_text(server: RunningServer) -> None:
    server.client.completions.create(model="fake", prompt="", max_tokens=1)
    assert len(server.engine.submitted[-1][0]) == 1


def test_a_model_without_a_chat_template() -> None:
    with serving(template=None) as server:
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*use /v1/completions") as caught:
            server.client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
        assert caught.value.code == "no_chat_template"


def test_health_and_metrics() -> None:
    with serving() as server:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "fake"}
        server.client.completions.create(model="fake", prompt="abc", max_tokens=4)
        list(server.client.completions.create(model="fake", prompt="abc", max_tokens=5, stream=True))
        with pytest.raises(openai.BadRequestError):
            server.client.completions.create(model="fake", prompt=[])
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        for line in (
            'truthgpt_requests_total{path="/v1/completions",status="200"} 2',
            'truthgpt_requests_total{path="/v1/completions",status="400"} 1',
            "truthgpt_prompt_tokens_total 6",
            "truthgpt_generated_tokens_total 9",
            "truthgpt_requests_running 0",
            "truthgpt_requests_waiting 0",
            "truthgpt_cache_tokens 1000",
            "truthgpt_engine_up 1",
        ):
            assert line in lines


@pytest.mark.parametrize(
    ("end", "stop", "stop_ids"), [("{{ eos_token }}", (), {256}), ("</{{ m.role }}>", ("</assistant>",), set())]
)
def test_a_chat_answer_ends_where_the_template_ends_it(end: str, stop: tuple[str, ...], stop_ids: set[int]) -> None:
    """As in `truthgpt chat`; a completion knows of no template."""
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}"
    with serving(template=template) as server:
        chat: list[Any] = [{"role": "user", "content": "Hi"}]
        server.client.chat.completions.create(model="fake", messages=chat, n=2, max_tokens=2, stop="#")
        for _, sampling in server.engine.submitted:
            assert (sampling.stop, sampling.stop_ids) == (("#", *stop), stop_ids)
        server.client.completions.create(model="fake", prompt="Hi", stop="#")
        assert (server.engine.submitted[-1][1].stop, server.engine.submitted[-1][1].stop_ids) == (("#",), set())


def test_a_model_without_a_known_limit() -> None:
    with serving(FakeEngine(context_tokens=None)) as server:
        server.client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
        used = len(chat_ids(("user", "Hi")))
        assert server.engine.submitted[-1][1].max_new_tokens == 1000 + 1 - used  # the cache's room
