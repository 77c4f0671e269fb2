"""The engine: greedy tokens are those of transformers, whatever else is in the batch, whatever the cache does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.inference.small_models import CONFIGS, POSITIONS, TOKENIZER, greedy_by_hand, small_model
from transformers import PreTrainedModel

from truthgpt.inference.engine import Engine
from truthgpt.inference.open_engine import open_engine
from truthgpt.inference.request import Piece, Sampling
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.fallbacks import Fallbacks

torch.set_num_threads(1)

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("def f(", "a", "longer than the sliding window", "abc", "x = 1")]


@contextmanager
def opened(model: PreTrainedModel, block_size: int = 4, **changes: Any) -> Iterator[Engine]:
    fallbacks = Fallbacks(strict=True)
    with open_engine(model, TOKENIZER, PagedKVCache(block_size), fallbacks, **changes) as engine:
        yield engine


def answers(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
    ids = [engine.submit(prompt, sampling) for prompt in prompts]
    return list(collect(engine, ids).values())


def collect(engine: Engine, ids: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {i: [] for i in ids}
    for piece in pieces(engine):
        found[piece.request_id] += piece.token_ids
    return found


def pieces(engine: Engine) -> Iterator[Piece]:
    while engine.has_work:
        yield from engine.step()


def by_hand(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int = 12) -> list[list[int]]:
    return [
        greedy_by_hand(model, list(prompt), min(count, POSITIONS + 1 - len(prompt)))[len(prompt) :]
        for prompt in prompts
    ]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_greedy_tokens_are_transformers_own(kind: str, block_size: int) -> None:
    model = small_model(kind)
    expected = by_hand(model, PROMPTS)
    with opened(model, block_size) as engine:
        assert answers(engine, PROMPTS) == expected
        assert [answers(engine, [prompt])[0] for prompt in PROMPTS] == expected, "alone"
        assert engine.load().cache_used_tokens == 0
