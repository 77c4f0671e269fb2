"""Runs engines to their end, and says what transformers would have written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from tests.inference.small_models import EOS, POSITIONS, TOKENIZER, small_model
from transformers import GenerationConfig, PreTrainedModel

from truthgpt.inference.engine import Engine
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.inference.paged_runner import PagedRunner
from truthgpt.inference.request import FinishReason, Piece, Sampling
from truthgpt.inference.token_sequence import TokenSequence
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.fallbacks import Fallbacks

GREEDY = Sampling(max_new_tokens=10, temperature=0.0)


@contextmanager
def opened(model: PreTrainedModel, block_size: int = 4, blocks: int = 1000, **changes: Any) -> Iterator[Engine]:
    """An engine with a paged cache of `blocks` blocks and nothing in its place; no block is held after its last
    answer."""
    fallbacks = Fallbacks(strict=True)
    policy = PagedKVCache(block_size)
    lengths = [block_size] * blocks
    with open_engine(model, TOKENIZER, policy, fallbacks, EngineOptions(2**28, **changes), lengths) as engine:
        assert engine.load().cache_tokens == blocks * block_size
        yield engine
        if not engine.has_work:
            assert (engine.load().running, engine.load().waiting, engine.load().cache_used_tokens) == (0, 0, 0)


@dataclass
class Answer:
    """All pieces of a request, joined."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None

    def take(self, piece: Piece) -> None:
        """Add one piece; nothing may follow the last one."""
        assert self.finish is None, "a piece after the last one"
        self.tokens += piece.token_ids
        self.text += piece.text
        self.finish = piece.finish


def finished(engine: Engine, ids: Iterable[int], steps: int = 10_000) -> dict[int, Answer]:
    """Run until there is no work; every request has an end then."""
    found = {request_id: Answer() for request_id in ids}
    for _ in range(steps):
        if not engine.has_work:
            break
        for piece in engine.step():
            found[piece.request_id].take(piece)
    assert not engine.has_work, f"still at work after {steps} steps: {engine.load()}"
    assert all(answer.finish is not None for answer in found.values())
    return found


def answers(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list[list[int]]:
    """The tokens after each of the prompts, which are submitted together."""
    ids = [engine.submit(prompt, sampling) for prompt in prompts]
    found = finished(engine, ids)
    return [found[i].tokens for i in ids]


@lru_cache(maxsize=1000)
def reference(kind: str, prompt: tuple[int, ...], count: int = GREEDY.max_new_tokens) -> list[int]:
    """Greedy tokens of transformers' own `generate`, in float32 and alone."""
    model = _model(kind)
    config = GenerationConfig(
        max_new_tokens=min(count, POSITIONS + 1 - len(prompt)), do_sample=False, eos_token_id=EOS, pad_token_id=0
    )
    model.generation_config = config
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [int(token) for token in output[0, len(prompt) :]]


@lru_cache(maxsize=10)
def _model(kind: str) -> PreTrainedModel:
    return small_model(kind).eval()


def counted_tokens(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Grows by (positions kept before, tokens run) of every request of every forward pass."""
    passes: list[list[tuple[int, int]]] = []
    run = PagedRunner.run

    def noted(self: PagedRunner, work: Any) -> torch.Tensor:
        if all(isinstance(sequence, TokenSequence) for sequence, _ in work):  # not the probe's
            passes.append([(sequence.computed, count) for sequence, count in work])
        return run(self, work)

    monkeypatch.setattr(PagedRunner, "run", noted)
    return passes


def running_ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes start before the host has seen the last tokens, as on a GPU; grows by the sequences of each such pass."""
    passes: list[int] = []

    def run_ahead(
        self: PagedRunner, sequences: Sequence[TokenSequence], tokens: torch.Tensor, rows: Sequence[int]
    ) -> torch.Tensor:
        assert all(s.pending == 0 for s in sequences), "its last token is not known yet"
        passes.append(len(sequences))
        new = [[max(0, int(tokens[row]))] for row in rows]
        with torch.no_grad():
            logits = self.forward(new, [s.computed for s in sequences], [tuple(s.kept.blocks) for s in sequences])
        for sequence in sequences:
            sequence.computed += 1
        return logits

    monkeypatch.setattr(PagedRunner, "runs_ahead", True)
    monkeypatch.setattr(PagedRunner, "run_ahead", run_ahead)
    return passes
