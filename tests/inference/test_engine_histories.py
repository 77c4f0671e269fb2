"""Random histories of an engine: whatever was submitted, cancelled and refused, every answer is the right one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.inference.engine_runs import Answer, opened, running_ahead
from tests.inference.small_models import EOS, TOKENIZER, small_model
from transformers import PreTrainedModel

from truthgpt.errors import ConfigError
from truthgpt.inference.engine import Engine, EngineLimits
from truthgpt.inference.request import Sampling
from truthgpt.inference.text_stream import continuation
from truthgpt.inference.token_sequence import TokenSequence
from truthgpt.kv_cache.paged import KVPages

torch.set_num_threads(1)


class Submit(NamedTuple):
    """Ask for an answer; `seed` is None for a greedy one."""

    prompt: tuple[int, ...]
    new_tokens: int
    seed: int | None


class Choices(NamedTuple):
    """Ask for several answers to a prompt."""

    prompt: tuple[int, ...]
    new_tokens: int
    seeds: list[int | None]


class Cancel(NamedTuple):
    """Break off one of the requests so far, whether it is answered already or not."""

    number: int


class Step(NamedTuple):
    """Go on for some steps."""

    count: int


class Room(NamedTuple):
    """What an engine has."""

    block_size: int
    blocks: int
    limits: EngineLimits
    ahead: bool


# Of two tokens, so that prompts and answers often begin alike.
PROMPTS = st.lists(st.sampled_from([97, 98]), min_size=1, max_size=14).map(tuple)
SEEDS = st.sampled_from([None, None, 0, 1])
SUBMIT = st.builds(Submit, PROMPTS, st.integers(1, 9), SEEDS)
CHOICES = st.builds(Choices, PROMPTS, st.integers(1, 9), st.lists(SEEDS, min_size=2, max_size=4))
HISTORIES = st.lists(
    st.one_of(SUBMIT, SUBMIT, CHOICES, st.builds(Step, st.integers(1, 4)), st.builds(Cancel, st.integers(0, 99))),
    min_size=12,
    max_size=30,
)
ROOMS = st.builds(
    Room,
    st.sampled_from([1, 2, 4]),
    st.integers(8, 24),
    st.builds(EngineLimits, st.sampled_from([1, 2, 5, 256]), st.sampled_from([1, 3, 8, 8192])),
    st.booleans(),
)


@lru_cache(maxsize=1)
def model() -> PreTrainedModel:
    return small_model("llama of one layer").eval()


@lru_cache(maxsize=10_000)
def expected(prompt: tuple[int, ...], new_tokens: int, seed: int | None) -> Answer:
    """Greedy: argmax of whole passes. Sampled: what an engine writes that has nothing else to do."""
    if seed is not None:
        with opened(model(), 4, blocks=40) as engine:
            found = follow(engine, [Submit(prompt, new_tokens, seed)])
        return found[0]
    ids = list(prompt)
    while len(ids) < len(prompt) + new_tokens:
        with torch.no_grad():
            ids.append(int(model()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    tokens = ids[len(prompt) :]
    return Answer(tokens, continuation(TOKENIZER, prompt, tokens), "stop" if tokens[-1] == EOS else "length")


def follow(engine: Engine, history: list[Submit | Cancel | Step]) -> list[Answer | None]:
    """Do all of it, then run to the end: the answers in the order they were asked for; None where one was refused."""
    ids: list[int | None] = []
    found: dict[int, Answer] = {}

    def go_on(steps: int) -> None:
        for _ in range(steps):
            for piece in engine.step():
                found[piece.request_id].take(piece)
            load = engine.load()
            assert load.cache_used_tokens <= load.cache_tokens and load.running <= engine._limits.sequences
            assert load.running + load.waiting == sum(answer.finish is None for answer in found.values())

    for event in history:
        if isinstance(event, Step):
            go_on(event.count)
        elif isinstance(event, Cancel):
            asked = [request_id for request_id in ids if request_id is not None]
            engine.cancel(asked[-1 - event.number % len(asked)] if asked else event.number)
        else:
            sampling = Sampling(event.new_tokens, 0.0 if event.seed is None else 1.0, seed=event.seed or 0)
            fits = len(event.prompt) + event.new_tokens - 1 <= engine.load().cache_tokens
            try:
                ids.append(engine.submit(event.prompt, sampling))
                found[ids[-1]] = Answer()
                assert fits
            except ConfigError:
                ids.append(None)
                assert not fits
    for _ in range(2000):
        if not engine.has_work:
            break
        go_on(1)
    assert not engine.has_work
    return [None if request_id is None else found[request_id] for request_id in ids]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ROOMS, HISTORIES)
def check_history(room: Room, choices: list[Submit | Choices | Cancel | Step]) -> None:
    """What the histories came to is counted, so that they cannot become empty unnoticed."""
    history: list[Submit | Cancel | Step] = []
    for event in choices:
        if isinstance(event, Choices):
            history += [Submit(event.prompt, event.new_tokens, seed) for seed in event.seeds]
        else:
            history.append(event)
    with pytest.MonkeyPatch.context() as patch:
        preempt = Engine._preempt

        def noted(engine: Engine, sequence: TokenSequence) -> None:
            SEEN["preempted"] += 1
            preempt(engine, sequence)

        def noted_copy(pages: KVPages, pairs: Sequence[tuple[int, int]]) -> None:
            SEEN["copied"] += len(pairs)
            copy(pages, pairs)

        copy = KVPages.copy
        patch.setattr(Engine, "_preempt", noted)
        patch.setattr(KVPages, "copy", noted_copy)
        passes = running_ahead(patch) if room.ahead else []
        with opened(model(), room.block_size, room.blocks, limits=room.limits) as engine:
            found = follow(engine, history)
    SEEN["ran ahead"] += len(passes)
    submitted = [event for event in history if isinstance(event, Submit)]
    for event, answer in zip(submitted, found, strict=True):
        SEEN["refused" if answer is None else str(answer.finish)] += 1
        if answer is None:
            continue
        wanted = expected(*event)
        if answer.finish == "cancelled":
            assert answer.tokens == wanted.tokens[: len(answer.tokens)]
            assert answer.text == continuation(TOKENIZER, event.prompt, answer.tokens)
        else:
            assert answer == wanted


SEEN: Counter[str] = Counter()


def test_every_answer_is_right_after_any_history() -> None:
    SEEN.clear()
    check_history()
    assert all(SEEN[kind] > 10 for kind in ("preempted", "copied", "ran ahead", "refused", "cancelled", "length")), SEEN
