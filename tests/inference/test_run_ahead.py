"""Passes that start before the host has seen the last tokens give the answers of passes that wait for them.

What only a GPU does is done on the CPU here: the tokens come as a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.inference.engine_runs import Answer, answers, finished, opened, reference, running_ahead
from tests.inference.small_models import EOS, POSITIONS, TOKENIZER, small_model
from transformers import PreTrainedModel

from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.request import Sampling

torch.set_num_threads(1)

PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("def f(", "a", "longer than the sliding window", "abc", "x = 1")]
SETTINGS = [Sampling(max_new_tokens=3 + 5 * i, temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.7, 0.0, 1.3))]


@contextmanager
def ahead(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, **changes: Any
) -> Iterator[tuple[Engine, list[int]]]:
    """An engine whose runner runs ahead, and how many sequences each pass of that kind had."""
    passes = running_ahead(monkeypatch)
    with opened(model, **changes) as engine:
        yield engine, passes


def written(engine: Engine, settings: Sequence[Sampling] = SETTINGS) -> list[list[int]]:
    ids = [engine.submit(prompt, sampling) for prompt, sampling in zip(PROMPTS, settings, strict=True)]
    return [answer.tokens for answer in finished(engine, ids).values()]


@pytest.mark.parametrize("changes", [{}, {"blocks": 18}, {"limits": EngineLimits(sequences=2, prompt_tokens=7)}])
def test_answers_are_those_of_an_engine_that_waits(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """With room for all; with so little that requests are put off; and with others that wait for their turn."""
    model = small_model("llama")
    with opened(model, **changes) as engine:
        expected = written(engine)
    with ahead(monkeypatch, model, **changes) as (engine, passes):
        assert written(engine) == expected
        assert sum(passes) > 20 and engine.load().cache_used_tokens == 0


def test_an_end_of_text_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    with opened(model) as engine:
        free = written(engine)
    stops = {tokens[len(tokens) // 2] for tokens in free} | {EOS}
    expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in stops), len(tokens))] for tokens in free]
    with ahead(monkeypatch, model) as (engine, _):
        engine._stop_ids = frozenset(stops)
        assert written(engine) == expected
        assert engine.load().cache_used_tokens == 0


def test_a_request_is_cancelled_and_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    greedy = Sampling(max_new_tokens=15, temperature=0.0)
    with opened(model) as engine:
        expected = [answers(engine, [prompt], greedy)[0] for prompt in PROMPTS]
    with ahead(monkeypatch, model) as (engine, _):
        ids = [engine.submit(prompt, greedy) for prompt in PROMPTS[:3]]
        found = {request_id: Answer() for request_id in ids}
        for _ in range(6):
            for piece in engine.step():
                found[piece.request_id].take(piece)
        engine.cancel(ids[1])
        ids += [engine.submit(prompt, greedy) for prompt in PROMPTS[3:]]
        found |= {request_id: Answer() for request_id in ids[3:]}
        while engine.has_work:
            for piece in engine.step():
                found[piece.request_id].take(piece)
        assert found[ids[1]].finish == "cancelled"
        assert found[ids[1]].tokens == expected[1][: len(found[ids[1]].tokens)]
        assert [found[i].tokens for i in ids[:1] + ids[2:]] == expected[:1] + expected[2:]


@pytest.mark.parametrize("prompt_tokens", [3, POSITIONS - 9])
def test_nothing_is_run_behind_the_last_token(monkeypatch: pytest.MonkeyPatch, prompt_tokens: int) -> None:
    """The second may fill the model's context to its end."""
    prompt = list(b"abcdefghij" * 5)[:prompt_tokens]
    expected = reference("llama", tuple(prompt))
    with ahead(monkeypatch, small_model("llama")) as (engine, passes):
        assert answers(engine, [prompt]) == [expected] and len(expected) == 10
    assert passes == [1] * 8, "of ten tokens: one with the prompt, one to begin with"
