"""What requests have in common is computed once and held once, and nobody waits for more than that."""

from __future__ import annotations

import pytest
import torch
from tests.inference.engine_runs import GREEDY, answers, counted_tokens, finished, opened, reference
from tests.inference.small_models import small_model

from truthgpt.inference.engine import EngineLimits

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
        engine.step()
        assert engine.load().cache_used_tokens == 32 and engine.load().waiting == 1
        engine.step()
        assert engine.load().cache_used_tokens == 32 + 4, "one block of its own"
        assert passes == [[(0, 29)], [(28, 1)], [(29, 1)]]
        finished(engine, [0, 1])  # their first pieces came before


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
        (64, SYSTEM, SYSTEM, False),  # less than a block
        (4, SYSTEM[:4], SYSTEM[:4], False),  # its last token is computed in any case
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
    assert run_tokens(passes) == 29
