"""The engine's greedy tokens are those of transformers' `generate`, whatever stands beside a request in the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tests.inference.engine_runs import answers, counted_tokens, finished, opened, reference
from tests.inference.small_models import CONFIGS, EOS, FURTHER, POSITIONS, TOKENIZER, small_model

from truthgpt.inference.engine import EngineLimits
from truthgpt.inference.request import Sampling

torch.set_num_threads(1)

SYSTEM = list(b"you are a careful assistant. ")
"""As long as seven blocks of four, and longer than every window."""
every_kind = pytest.mark.parametrize("kind", [*CONFIGS, *FURTHER])


def ragged(count: int) -> list[list[int]]:
    """Prompts of 1 to 38 tokens."""
    draw = random.Random(count)
    return [[draw.randrange(EOS) for _ in range(1 + 37 * n // max(count - 1, 1))] for n in range(count)]


def sharing(count: int) -> list[list[int]]:
    """Prompts that begin alike, some of them the same to the end, and some that are others' beginnings."""
    draw = random.Random(count)
    endings = [[draw.randrange(EOS) for _ in range(draw.randrange(1, 9))] for _ in range(7)]
    prompts = [SYSTEM + ending for ending in endings] + [SYSTEM, SYSTEM[:17], SYSTEM[:16], SYSTEM[:8]]
    return [draw.choice(prompts) for _ in range(count)]


def expected(kind: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [reference(kind, tuple(prompt)) for prompt in prompts]


@every_kind
@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_greedy_tokens_are_transformers_own(kind: str, block_size: int) -> None:
    prompts = ragged(8)
    with opened(small_model(kind), block_size) as engine:
        assert answers(engine, prompts) == expected(kind, prompts)


@every_kind
@pytest.mark.parametrize("count", [1, 8, 64])
def test_beginnings_that_are_shared_change_nothing(kind: str, count: int) -> None:
    prompts = sharing(count)
    with opened(small_model(kind)) as engine:
        assert answers(engine, prompts) == expected(kind, prompts)
        assert answers(engine, prompts) == expected(kind, prompts), "when all of it was computed before"


@every_kind
def test_sixty_four_ragged_prompts_at_once(kind: str) -> None:
    prompts = ragged(64)
    with opened(small_model(kind)) as engine:
        assert answers(engine, prompts) == expected(kind, prompts)


@every_kind
@pytest.mark.parametrize("prompt_tokens", [1, 5])
def test_prompts_in_chunks_give_the_same_tokens(kind: str, prompt_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    prompts = [*ragged(6), *sharing(3)]
    with opened(small_model(kind), limits=EngineLimits(prompt_tokens=prompt_tokens)) as engine:
        assert answers(engine, prompts) == expected(kind, prompts)
    assert max(sum(count for _, count in work if count > 1) for work in passes) <= prompt_tokens
    assert sum(any(start > 0 and count > 1 for start, count in work) for work in passes) > 5 or prompt_tokens == 1


@every_kind
@pytest.mark.parametrize("sequences", [1, 3])
def test_no_more_answers_at_once_than_allowed(kind: str, sequences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    prompts = ragged(8)
    with opened(small_model(kind), limits=EngineLimits(sequences=sequences)) as engine:
        ids = [engine.submit(prompt, Sampling(10, temperature=0.0)) for prompt in prompts]
        assert (engine.load().running, engine.load().waiting) == (0, 8)
        engine.step()
        assert (engine.load().running, engine.load().waiting) == (sequences, 8 - sequences)
        assert list(finished(engine, ids)) == ids
    assert max(map(len, passes)) == sequences


@every_kind
def test_requests_that_come_while_others_run(kind: str) -> None:
    prompts = [*ragged(6), *sharing(6)]
    with opened(small_model(kind)) as engine:
        found: dict[int, list[int]] = {}
        for prompt in prompts:
            found[engine.submit(prompt, Sampling(10, temperature=0.0))] = []
            for piece in engine.step():
                found[piece.request_id] += piece.token_ids
        while engine.has_work:
            for piece in engine.step():
                found[piece.request_id] += piece.token_ids
        assert list(found.values()) == expected(kind, prompts)


@every_kind
def test_the_context_ends_an_answer(kind: str) -> None:
    for tokens in (POSITIONS - 3, POSITIONS - 1, POSITIONS):
        prompt = list(b"abcdefghij" * 5)[:tokens]
        with opened(small_model(kind)) as engine:
            (answer,) = finished(engine, [engine.submit(prompt, Sampling(10, temperature=0.0))]).values()
        assert answer.tokens == reference(kind, tuple(prompt))
        ended = answer.tokens[-1] == EOS
        assert answer.finish == ("stop" if ended else "length")
        assert ended or len(answer.tokens) == POSITIONS + 1 - tokens


def test_the_prompts_are_those_that_were_meant() -> None:
    assert sorted(map(len, ragged(8)))[::7] == [1, 38] and len(SYSTEM) > 7 * 4
    assert len({tuple(prompt) for prompt in sharing(64)}) == 11 and TOKENIZER.decode(SYSTEM)
