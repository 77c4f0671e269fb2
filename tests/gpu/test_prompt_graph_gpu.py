"""Prompts as CUDA graphs: the logits and the cache of the passes that they stand for."""

from __future__ import annotations

import random

import pytest
import torch
from tests.gpu.gpu_runs import needs_compiler
from tests.inference.engine_runs import finished, opened
from tests.inference.small_models import EOS, small_model

from truthgpt.inference.paged_probe import attention_layers
from truthgpt.inference.paged_runner import PagedRunner, paged_model
from truthgpt.inference.prompt_graph import MOST_PROMPTS, PromptGraphs
from truthgpt.inference.request import Sampling
from truthgpt.kv_cache.paged import PagedKVCache

pytestmark = [pytest.mark.gpu, needs_compiler]
PASSES = [(5, 9, 3), (40,), (2,), tuple(range(1, MOST_PROMPTS + 1)), (48, 48, 48), (31, 33), (5, 9, 3), (64,), (63, 2)]
"""Tokens of the prompts of each; several use a graph that others were captured in, with other borders."""
BLOCK, BLOCKS = 16, 4


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma3_text"])
def test_logits_and_cache_are_those_of_a_pass(kind: str) -> None:
    model = small_model(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)  # clear choices are large scores, whose rounding in bf16 would be another choice
    model.cuda().bfloat16()
    layers = attention_layers(model)
    assert layers.flash
    numbers = random.Random(0)
    asked = [[[numbers.randrange(EOS) for _ in range(min(count, 48))] for count in counts] for counts in PASSES]
    found = []
    for flash in (False, True):
        cache = PagedKVCache(BLOCK).allocate(layers.shapes, MOST_PROMPTS * BLOCKS, layers.dtype, model.device)
        with paged_model(model, layers.modules, cache), torch.no_grad():
            runner = PagedRunner(model, cache, flash=flash)
            assert (runner._prompt_graphs is not None) == flash
            for new in asked:
                for pages in (*cache.keys, *cache.values):
                    pages.fill_(7.0)
                tables = [tuple(range(row * BLOCKS, (row + 1) * BLOCKS)) for row in range(len(new))]
                logits = runner.forward(new, [0] * len(new), tables).clone()
                found.append((flash, logits, [pages.clone() for pages in (*cache.keys, *cache.values)]))
    half = len(found) // 2
    for (_, logits, pages), (_, by_graph, pages_by_graph) in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(by_graph, logits, rtol=0.02, atol=0.02 * float(logits.abs().max()))
        for one, other in zip(pages, pages_by_graph, strict=True):
            torch.testing.assert_close(other, one, rtol=0.02, atol=0.05)
            assert torch.equal(one == 7.0, other == 7.0), "padding was written"


@pytest.mark.parametrize("compiled", [False, True])
def test_an_engine_writes_the_same_with_and_without_them(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 near ties may fall otherwise: most answers are equal, and all begin alike."""
    numbers = random.Random(1)
    prompts = [[numbers.randrange(EOS) for _ in range(numbers.randint(1, 30))] for _ in range(24)]
    answers = []
    for with_graphs in (False, True):
        if not with_graphs:
            monkeypatch.setattr(PromptGraphs, "fit", staticmethod(lambda starts, counts: False))
        else:
            monkeypatch.undo()
        model = small_model("llama").cuda().bfloat16()
        with opened(model, block_size=16, compiled=compiled) as engine:
            ids = [engine.submit(prompt, Sampling(max_new_tokens=10, temperature=0.0)) for prompt in prompts]
            done = finished(engine, ids)
            answers.append([done[i].tokens for i in ids])
    equal = sum(one == other for one, other in zip(*answers, strict=True))
    assert equal >= 0.8 * len(prompts)
