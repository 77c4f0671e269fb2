"""What a graph of prompts computes, here without a graph and a GPU: the padding changes nothing."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.inference.small_models import CONFIGS, EOS, small_model

import truthgpt.attention.paged
import truthgpt.inference.prompt_graph
from truthgpt.inference.paged_probe import attention_layers
from truthgpt.inference.paged_runner import PagedRunner, paged_model
from truthgpt.inference.prompt_graph import MOST_PROMPTS, TOKENS, PromptGraphs
from truthgpt.kv_cache.paged import PagedKVCache

PASSES = [
    (5, 9, 3),
    (40,),
    (2,),
    tuple(range(1, MOST_PROMPTS + 1)),
    (48, 48, 48),
    (31, 33),
    (5, 9, 3),
    (48, 16),
    (47, 2),
]
"""Tokens of the prompts of each; several use a graph that others were captured in, with other borders."""
BLOCK, BLOCKS = 16, 4


def varlen_by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, longest: tuple[int, int],
    scaling: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """The kernel's formula; a token that no sequence has comes out as NaN."""
    output = torch.full_like(query, torch.nan)
    for first, end in zip(borders[0, :-1].tolist(), borders[0, 1:].tolist(), strict=True):
        assert 0 <= end - first <= longest[0]
        q, k, v = (t[first:end].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
        behind = torch.arange(end - first)[:, None] - torch.arange(end - first)
        visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        scores = (q @ k.mT * scaling).masked_fill(~visible, -torch.inf)
        output[first:end] = (scores.softmax(dim=-1) @ v).transpose(0, 1)
    return output


def written(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    kept = slots >= 0
    keys.flatten(0, 1)[slots[kept]] = key[kept]
    values.flatten(0, 1)[slots[kept]] = value[kept]


class NoCapture:
    """What is replayed is run."""

    def __init__(self, run: Any, values: Any, *_: Any) -> None:
        self.inputs = torch.from_numpy(values)
        self._run = run
        self.graph = SimpleNamespace(replay=self._replay)

    def write(self, values: Any) -> None:
        self.inputs.copy_(torch.from_numpy(values))

    def _replay(self) -> None:
        self.logits = self._run(self.inputs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truthgpt.inference.prompt_graph, "capture", NoCapture)
    monkeypatch.setattr(truthgpt.attention.paged, "varlen_between", varlen_by_hand)
    monkeypatch.setattr(truthgpt.attention.paged, "write_pages", written, raising=False)
    monkeypatch.setattr(truthgpt.attention.paged, "flash_serves", lambda *_: True)
    model = small_model(kind).eval()
    layers = attention_layers(model)
    numbers = random.Random(0)
    for counts in PASSES:
        new = [[numbers.randrange(EOS) for _ in range(count)] for count in counts]
        tables = [tuple(range(row * BLOCKS, (row + 1) * BLOCKS)) for row in range(len(new))]
        found = []
        for by_graph in (False, True):
            cache = PagedKVCache(BLOCK).allocate(layers.shapes, MOST_PROMPTS * BLOCKS, layers.dtype, model.device)
            for pages in (*cache.keys, *cache.values):
                pages.fill_(7.0)
            with paged_model(model, layers.modules, cache), torch.no_grad():
                runner = PagedRunner(model, cache)
                if by_graph:
                    runner._prompt_graphs = PromptGraphs(runner._run_step, None, model.device)
                found.append((runner.forward(new, [0] * len(new), tables), *cache.keys, *cache.values))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_what_a_graph_serves() -> None:
    assert PromptGraphs.fit([0, 0], [5, 2])
    assert not PromptGraphs.fit([0, 4], [5, 2]), "something stands before"
    assert not PromptGraphs.fit([0] * (MOST_PROMPTS + 1), [1] * (MOST_PROMPTS + 1))
    assert PromptGraphs.fit([0], [TOKENS[-1]]) and not PromptGraphs.fit([0], [TOKENS[-1] + 1])
