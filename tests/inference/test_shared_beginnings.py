"""What requests have in common is computed once and held once, and nobody waits for more than that."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from tests.inference.engine_runs import (
    GREEDY,
    Answer,
    answers,
    counted_tokens,
    finished,
    opened,
    reference,
    running_ahead,
)
from tests.inference.small_models import small_model

from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.request import Sampling

torch.set_num_threads(1)

SYSTEM = list(b"you are a careful assistant. ")


def run_tokens(passes: list[list[tuple[int, int]]]) -> int:
    """Tokens of prompts that were run."""
    return sum(count for work in passes for _, count in work if count > 1)


def test_the_same_prompt_twice_is_computed_and_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    with opened(small_model("llama"), 4) as engine:
        engine.submit(SYSTEM, GREEDY)  # 29 tokens: seven whole blocks and one more token
        engine.submit(SYSTEM, GREEDY)
        assert [piece.request_id for piece in engine.step()] == [0, 1], "both have their first token"
        assert engine.load().cache_used_tokens == 32 and engine.load().running == 2
        engine.step()
        assert engine.load().cache_used_tokens == 32 + 4, "one block of its own"
        assert passes == [[(0, 29)], [(29, 1), (29, 1)]]
        finished(engine, [0, 1])  # their first pieces came before


CHOICES = [Sampling(max_new_tokens=10, temperature=1.0, seed=seed) for seed in (0, 1, 2, 1)]


@lru_cache
def alone(prompt: tuple[int, ...], sampling: Sampling) -> Answer:
    """Of an engine that has nothing else to do."""
    with opened(small_model("llama"), 4) as engine:
        return finished(engine, [engine.submit(prompt, sampling)])[0]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 29])
def test_choices_of_a_prompt_compute_it_once_and_are_those_of_separate_requests(
    length: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, passes = SYSTEM[:length], counted_tokens(monkeypatch)
    if ahead:
        running_ahead(monkeypatch)
    with opened(small_model("llama"), 4) as engine:
        found = finished(engine, [engine.submit(prompt, sampling) for sampling in CHOICES])
    assert passes[0] == [(0, length)], "and no other pass has a token of it"
    assert all(begin >= length for work in passes[1:] for begin, _ in work)
    expected = [alone(tuple(prompt), sampling) for sampling in CHOICES]
    assert list(found.values()) == expected
    assert expected[0] != expected[1] != expected[2] and expected[1] == expected[3]


def test_choices_of_several_prompts_at_once() -> None:
    asked = [(tuple(SYSTEM[begin:12]), sampling) for begin in (6, 3, 1) for sampling in CHOICES]
    with opened(small_model("llama"), 4) as engine:
        found = finished(engine, [engine.submit(prompt, sampling) for prompt, sampling in asked])
    assert list(found.values()) == [alone(prompt, sampling) for prompt, sampling in asked]


def test_choices_go_on_when_the_first_is_cancelled_before_its_prompt_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    with opened(small_model("llama"), 4, limits=EngineLimits(prompt_tokens=9)) as engine:
        ids = [engine.submit(SYSTEM, sampling) for sampling in CHOICES]
        assert engine.step() == [] and (engine.load().running, engine.load().waiting) == (1, 3)
        engine.cancel(0)
        found = finished(engine, ids)
    assert run_tokens(passes) == 29 + 1, "of the nine tokens of the first, two blocks were kept"
    assert (found[0].finish, found[0].tokens) == ("cancelled", [])
    assert [found[i] for i in ids[1:]] == [alone(tuple(SYSTEM), sampling) for sampling in CHOICES[1:]]


def test_choices_go_on_when_the_first_is_cancelled_after_they_were_forked() -> None:
    with opened(small_model("llama"), 4) as engine:
        ids = [engine.submit(SYSTEM, sampling) for sampling in CHOICES]
        first = {piece.request_id: list(piece.token_ids) for piece in engine.step()}
        engine.cancel(0)
        found = finished(engine, ids)
    assert found[0].finish == "cancelled"
    for i in ids[1:]:
        assert first[i] + found[i].tokens == alone(tuple(SYSTEM), CHOICES[i]).tokens


def test_choices_that_are_put_off_are_written_again_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """29 tokens and 10 new ones take ten blocks; four choices share seven of them, and would need nineteen."""
    preempt, preempted = Engine._preempt, []
    monkeypatch.setattr(Engine, "_preempt", lambda self, s: (preempted.append(s.request_id), preempt(self, s)))
    with opened(small_model("llama"), 4, blocks=11) as engine:
        found = finished(engine, [engine.submit(SYSTEM, sampling) for sampling in CHOICES])
    assert list(found.values()) == [alone(tuple(SYSTEM), sampling) for sampling in CHOICES]
    assert preempted and 0 not in preempted


def test_no_more_choices_are_written_at_once_than_the_engine_has_room_for() -> None:
    with opened(small_model("llama"), 4, limits=EngineLimits(sequences=3)) as engine:
        ids = [engine.submit(SYSTEM, sampling) for sampling in CHOICES]
        assert [piece.request_id for piece in engine.step()] == ids[:3]
        assert (engine.load().running, engine.load().waiting) == (3, 1)
        finished(engine, ids)


def test_many_with_one_beginning_wait_for_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    prompts = [[*SYSTEM, n, n, n] for n in range(20)]
    with opened(small_model("llama"), 4) as engine:
        found = answers(engine, prompts)
    assert found == [reference("llama", tuple(prompt)) for prompt in prompts]
    assert run_tokens(passes) == 32 + 19 * (32 - 28), "the beginning once, and the ends"
    prompt_passes = [work for work in passes if any(count > 1 for _, count in work)]
    assert [len(work) for work in prompt_passes] == [1, 19]


def test_who_was_put_off_keeps_its_turn() -> None:
    prompts = [[*SYSTEM, n, n, n] for n in range(6)]
    with opened(small_model("llama"), 4, limits=EngineLimits(sequences=4)) as engine:
        for prompt in prompts:
            engine.submit(prompt, GREEDY)
        assert [piece.request_id for piece in engine.step()] == [0]
        assert [piece.request_id for piece in engine.step()] == [1, 2, 3, 0]
        finished(engine, range(6))


def test_who_waits_for_a_beginning_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a questionnaire: four endings to each of several beginnings."""
    passes = counted_tokens(monkeypatch)
    prompts = [[first, *SYSTEM, n, n, n] for first in range(5) for n in range(4)]
    with opened(small_model("llama"), 4) as engine:
        found = answers(engine, prompts)
    assert found == [reference("llama", tuple(prompt)) for prompt in prompts]
    prompt_passes = [work for work in passes if any(count > 1 for _, count in work)]
    assert [len(work) for work in prompt_passes] == [5, 15]


@pytest.mark.parametrize(
    ("block_size", "first", "second", "waits"),
    [
        (4, SYSTEM[:9], [*SYSTEM[:8], 1], True),  # two blocks in common
        (4, SYSTEM[:9], [*SYSTEM[:3], 1, 2, 3], False),  # not one
        (64, SYSTEM, [*SYSTEM, 1], False),  # less than a block
        (4, SYSTEM[:4], [*SYSTEM[:3], 1], False),  # its last token is computed in any case
    ],
)
def test_only_who_gains_a_block_waits(
    block_size: int, first: list[int], second: list[int], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted_tokens(monkeypatch)
    with opened(small_model("llama"), block_size) as engine:
        assert answers(engine, [first, second]) == [reference("llama", tuple(p)) for p in (first, second)]
    assert len(passes[0]) == (1 if waits else 2)


def test_a_prompt_in_chunks_is_shared_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted_tokens(monkeypatch)
    with opened(small_model("llama"), 4, limits=EngineLimits(prompt_tokens=10)) as engine:
        assert answers(engine, [SYSTEM, SYSTEM]) == [reference("llama", tuple(SYSTEM))] * 2
    assert passes[:3] == [[(0, 10)], [(10, 10)], [(20, 9)]]
    assert all(begin >= 29 for work in passes[3:] for begin, _ in work)
