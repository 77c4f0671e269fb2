"""What becomes of single requests: sampled alike in any company, cancelled, stopped, refused, preempted."""

from __future__ import annotations

import dataclasses
import random
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.inference.engine_runs import (
    GREEDY,
    Answer,
    answers,
    finished,
    opened,
    reference,
    running_ahead,
)
from tests.inference.small_models import CONFIGS, EOS, POSITIONS, TOKENIZER, small_model

from truthgpt.errors import ConfigError
from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.paged_runner import PagedRunner
from truthgpt.inference.request import Sampling
from truthgpt.inference.sampling import sample
from truthgpt.inference.text_stream import continuation

torch.set_num_threads(1)

PROMPT = list(b"def f(")
SYSTEM = list(b"you are a careful assistant. ")


def mixed_requests(count: int) -> list[tuple[list[int], Sampling]]:
    """Prompts and settings of all kinds, each of its own seed."""
    draw = random.Random(5)
    requests = []
    for number in range(count):
        prompt = [draw.randrange(EOS) for _ in range(draw.randrange(1, 30))]
        settings = Sampling(
            max_new_tokens=draw.randrange(1, 16),
            temperature=draw.choice([0.0, 0.7, 1.0, 1.5]),
            top_k=draw.choice([0, 1, 5, 50]),
            top_p=draw.choice([1.0, 0.9, 0.5]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            seed=number,
            stop=draw.choice([(), tuple(string.ascii_letters), ("ab", "\n")]),
        )
        requests.append((SYSTEM[:18] + prompt if number % 3 == 0 else prompt, settings))
    return requests


def alone(engine: Engine, requests: Sequence[tuple[list[int], Sampling]]) -> list[Answer]:
    return [finished(engine, [request_id := engine.submit(*request)])[request_id] for request in requests]


@pytest.fixture(params=["waits", "runs ahead"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that start when the last tokens are known, and, as on a GPU, before."""
    if request.param == "runs ahead":
        running_ahead(monkeypatch)


def test_sampled_tokens_follow_from_logits_seed_and_position() -> None:
    """The same sampler over the logits of whole passes."""
    settings = Sampling(20, 1.0, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=9)
    model = small_model("llama").eval()
    ids = list(PROMPT)
    for position in range(20):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids += sample(logits, [settings], [position], [ids]).tolist()
    with opened(model) as engine:
        assert answers(engine, [PROMPT], settings) == [ids[len(PROMPT) :]]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "changes", [{}, {"limits": EngineLimits(sequences=7, prompt_tokens=11)}, {"blocks": 30}], ids=str
)
def test_a_sampled_answer_is_the_same_alone_and_among_others(kind: str, changes: dict[str, Any]) -> None:
    """Admitted at different steps, in chunks, and with a cache that makes some give way again and again."""
    model = small_model(kind)
    requests = mixed_requests(32)
    with opened(model) as engine:
        wanted = alone(engine, requests)
    with opened(model, **changes) as engine:
        found: dict[int, Answer] = {}
        for number, request in enumerate(requests):
            found[engine.submit(*request)] = Answer()
            for piece in engine.step() if number % 3 == 0 else ():
                found[piece.request_id].take(piece)
        while engine.has_work:
            for piece in engine.step():
                found[piece.request_id].take(piece)
    assert list(found.values()) == wanted
    assert len({tuple(answer.tokens) for answer in wanted}) > 25
    assert {answer.finish for answer in wanted} == {"stop", "length"}


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each request had to give its blocks back."""
    counts: Counter[int] = Counter()
    preempt = Engine._preempt

    def noted(self: Engine, sequence: Any) -> None:
        counts[sequence.request_id] += 1
        preempt(self, sequence)

    monkeypatch.setattr(Engine, "_preempt", noted)
    return counts


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("limits", [EngineLimits(), EngineLimits(prompt_tokens=3)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4])
def test_who_gives_way_to_others_writes_the_same(
    block_size: int, limits: EngineLimits, temperature: float, preempted: Counter[int]
) -> None:
    model = small_model("llama")
    prompts = [[*SYSTEM[: 3 + n], n] for n in range(8)]
    settings = [Sampling(20, temperature, seed=n) for n in range(8)]
    with opened(model, block_size) as engine:
        wanted = alone(engine, list(zip(prompts, settings, strict=True)))
    assert not preempted
    blocks = 36 // block_size
    with opened(model, block_size, blocks, limits=limits) as engine:
        ids = [engine.submit(*request) for request in zip(prompts, settings, strict=True)]
        assert list(finished(engine, ids).values()) == wanted
    assert sum(preempted.values()) >= 5 and ids[0] not in preempted, preempted


@pytest.mark.parametrize("first_tokens", [(0, 1, 2, 3, 4, 5), (0, 1, 0, 2, 1, 3)], ids=["different", "some alike"])
def test_who_came_first_is_answered_first_when_the_cache_is_full(
    first_tokens: tuple[int, ...], preempted: Counter[int]
) -> None:
    with opened(small_model("llama"), 4, blocks=9) as engine:
        ids = [engine.submit([token] * 8, Sampling(20, seed=n)) for n, token in enumerate(first_tokens)]
        ended = []
        while engine.has_work:
            ended += [piece.request_id for piece in engine.step() if piece.finish == "length"]
    assert preempted and ended == ids


def test_cancelled_while_waiting() -> None:
    with opened(small_model(), limits=EngineLimits(sequences=1)) as engine:
        first, second, third = (engine.submit(PROMPT, GREEDY) for _ in range(3))
        engine.cancel(second)
        found = finished(engine, (first, second, third))
    assert found[second] == Answer([], "", "cancelled")
    assert found[first].tokens == found[third].tokens == reference("gpt2", tuple(PROMPT))


@pytest.mark.parametrize("streaming", [False, True])
def test_cancelled_while_it_is_written(streaming: bool) -> None:
    with opened(small_model(), streaming=streaming) as engine:
        first, second = engine.submit(PROMPT, GREEDY), engine.submit(SYSTEM, GREEDY)
        found = {first: Answer(), second: Answer()}
        for step in range(100):
            if step == 4:
                engine.cancel(first)
                engine.cancel(first)
            for piece in engine.step():
                found[piece.request_id].take(piece)
            if step == 4:
                assert engine.load().running == 1
        assert not engine.has_work
    assert found[first].finish == "cancelled" and found[first].tokens == reference("gpt2", tuple(PROMPT))[:4]
    assert found[first].text == continuation(TOKENIZER, PROMPT, found[first].tokens) != ""
    assert found[second].tokens == reference("gpt2", tuple(SYSTEM))


def test_cancelled_within_its_prompt() -> None:
    with opened(small_model(), limits=EngineLimits(prompt_tokens=5)) as engine:
        first = engine.submit(SYSTEM, GREEDY)
        assert engine.step() == engine.step() == []
        assert engine.load().running == 1 and engine.load().cache_used_tokens == 12
        engine.cancel(first)
        assert finished(engine, [first]) == {first: Answer([], "", "cancelled")}


def test_cancelled_after_it_gave_way(preempted: Counter[int]) -> None:
    with opened(small_model("llama"), 4, blocks=9) as engine:
        ids = [engine.submit([n] * 8, Sampling(20, seed=n)) for n in range(4)]
        found = {request_id: Answer() for request_id in ids}
        while not preempted:
            for piece in engine.step():
                found[piece.request_id].take(piece)
        (given_way,) = preempted
        engine.cancel(given_way)
        for piece in (piece for _ in range(200) for piece in engine.step()):
            found[piece.request_id].take(piece)
        assert not engine.has_work
    assert {found[i].finish for i in ids if i != given_way} == {"length"}
    assert found[given_way].finish == "cancelled" and found[given_way].tokens


def test_cancelling_what_is_not_there_is_ignored() -> None:
    with opened(small_model()) as engine:
        engine.cancel(0)
        engine.cancel(-1)
        first = engine.submit(PROMPT, GREEDY)
        assert finished(engine, [first])[first].finish == "length"
        engine.cancel(first)
        assert engine.step() == [] and not engine.has_work
        second = engine.submit(PROMPT, GREEDY)
        assert second != first and finished(engine, [second])[second].finish == "length"


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("streaming", [False, True])
def test_stop_texts_end_an_answer(streaming: bool) -> None:
    whole = reference("gpt2", tuple(PROMPT))
    text = continuation(TOKENIZER, PROMPT, whole)
    printable = next(n for n in range(2, len(text) - 1) if text.find(text[n : n + 2]) == n)
    stop = text[printable : printable + 2]
    with opened(small_model(), streaming=streaming) as engine:
        request = engine.submit(PROMPT, dataclasses.replace(GREEDY, stop=("never this", stop)))
        other = engine.submit(PROMPT, GREEDY)
        found = finished(engine, [request, other])
    assert found[request].finish == "stop" and found[request].text == text[:printable]
    assert found[request].tokens == whole[: len(found[request].tokens)] != whole
    assert found[other] == Answer(whole, text, "length")


def writing(token: int, after: int, kind: str = "llama") -> tuple[Any, list[int]]:
    """A model that writes `token` behind `after` and its own choices elsewhere, and the tokens before and with it."""
    model = small_model(kind).eval()
    ids = [*PROMPT]
    for _ in range(after):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return model, ids[len(PROMPT) :]


@pytest.mark.parametrize("whose", ["model", "request"])
def test_an_end_token_ends_an_answer(whose: str) -> None:
    model, tokens = writing(EOS, after=6)
    position = next(n for n, token in enumerate(tokens) if tokens.index(token) == n and n >= 2)
    sampling = GREEDY
    if whose == "model":
        model.generation_config.eos_token_id = tokens[position]
        model.generation_config._from_model_config = False
    else:
        sampling = dataclasses.replace(GREEDY, stop_ids=frozenset({tokens[position]}))
    with opened(model) as engine:
        (answer,) = finished(engine, [engine.submit(PROMPT, sampling)]).values()
    assert answer.finish == "stop" and answer.tokens == tokens[: position + 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_comes_with_the_tokens_or_at_the_end(streaming: bool) -> None:
    with opened(small_model(), streaming=streaming) as engine:
        engine.submit(PROMPT, GREEDY)
        texts = [piece.text for _ in range(20) for piece in engine.step()]
    assert len(texts) == 10 and "".join(texts) == continuation(TOKENIZER, PROMPT, reference("gpt2", tuple(PROMPT)))
    assert sum(map(bool, texts)) > 5 if streaming else not any(texts[:-1])


REFUSED: dict[str, tuple[list[int], Sampling, str]] = {
    "empty": ([], GREEDY, "the prompt is empty"),
    "too long": ([1] * (POSITIONS + 1), GREEDY, f"49 tokens, the model's context {POSITIONS}: shorten it"),
    "unknown token": ([1, EOS + 1, 2], GREEDY, "token id 257 is not in the model's vocabulary of 257"),
    "negative token": ([1, -1, 2], GREEDY, "token id -1 is not in the model's vocabulary of 257"),
    "larger than the cache": ([1] * 30, Sampling(12), "need 41 positions of the cache, which has 40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_others_running(case: str) -> None:
    prompt, settings, message = REFUSED[case]
    with opened(small_model(), 4, blocks=10) as engine:
        first = engine.submit(PROMPT, GREEDY)
        before = engine.step()
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                engine.submit(prompt, settings)
        assert engine.load().waiting == 0
        answer = Answer()
        for piece in (*before, *(piece for _ in range(20) for piece in engine.step())):
            assert piece.request_id == first
            answer.take(piece)
        assert answer.tokens == reference("gpt2", tuple(PROMPT))
        assert answers(engine, [[1] * 30], Sampling(11, 0.0)) == [reference("gpt2", (1,) * 30, 11)], "fills it whole"


def test_abandon_forgets_all_and_holds_nothing() -> None:
    with opened(small_model("llama"), limits=EngineLimits(sequences=3, prompt_tokens=20)) as engine:
        for n in range(6):
            engine.submit([*SYSTEM, n], GREEDY)
        engine.step()
        assert engine.load().running == 1 and engine.load().waiting == 5
        engine.cancel(4)
        engine.abandon()
        assert not engine.has_work and engine.load().cache_used_tokens == 0
        assert engine.step() == []
        assert answers(engine, [PROMPT, SYSTEM]) == [reference("llama", tuple(p)) for p in (PROMPT, SYSTEM)]


def failing_once(monkeypatch: pytest.MonkeyPatch, model: Any, after: int) -> None:
    """The model runs out of memory in one forward pass."""
    forward, calls = model.forward, [0]

    def sometimes(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            raise torch.OutOfMemoryError("no memory")
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", sometimes)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_after_an_error_in_a_step_and_abandon_the_engine_is_right(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    prompts = [[*SYSTEM, n] for n in range(4)]
    with opened(model) as engine:
        failing_once(monkeypatch, model, after)
        for prompt in prompts:
            engine.submit(prompt, GREEDY)
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(after + 1):
                engine.step()
        engine.abandon()
        assert engine.load().cache_used_tokens == 0
        assert answers(engine, prompts) == [reference("llama", tuple(prompt)) for prompt in prompts]


@pytest.mark.usefixtures("either_way")
def test_logits_that_are_not_finite_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PagedRunner.forward

    def spoilt(self: PagedRunner, new: Any, starts: Any, tables: Any) -> torch.Tensor:
        logits = forward(self, new, starts, tables).clone()
        for row, (tokens, start) in enumerate(zip(new, starts, strict=True)):
            if start + len(tokens) == len(SYSTEM) + 3:  # where only one of them is
                logits[row, 7] = float("nan")
        return logits

    monkeypatch.setattr(PagedRunner, "forward", spoilt)
    with opened(small_model()) as engine:
        ids = [engine.submit(prompt, GREEDY) for prompt in (PROMPT, SYSTEM, PROMPT)]
        found = finished(engine, ids)
    whole = reference("gpt2", tuple(SYSTEM))
    assert found[ids[1]] == Answer(whole[:3], continuation(TOKENIZER, SYSTEM, whole[:3]), "error")
    assert found[ids[0]].tokens == found[ids[2]].tokens == reference("gpt2", tuple(PROMPT))
