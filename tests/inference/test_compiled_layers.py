"""Compiled layers over a paged cache: what a pass computes stands in tensors, so that few graphs serve all passes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from tests.inference.small_models import CONFIGS, EOS, small_model
from torch import library
from torch._dynamo.utils import counters

from truthgpt.attention.paged import InOneRow, OneByOne, step_in_use
from truthgpt.inference.paged_probe import attention_layers
from truthgpt.inference.paged_runner import PagedRunner, paged_model
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.compile import decoder_layers

BLOCKS, BLOCK = 12, 4
COUNTS = [(5, 9, 3), (7,), (1, 1, 1), (3, 1), (1,), (2, 2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 1), (1,), (6, 4)]
"""New tokens of each sequence in one pass after the other; each sequence goes on from what it has. The first pass has
no size that the model has too: torch would take them for one and the same."""


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def logits_of_passes(runner: PagedRunner) -> list[torch.Tensor]:
    numbers = random.Random(0)
    lengths = [0] * max(map(len, COUNTS))
    found = []
    for counts in COUNTS:
        new = [[numbers.randrange(EOS) for _ in range(count)] for count in counts]
        tables = [tuple(range(row * BLOCKS, (row + 1) * BLOCKS)) for row in range(len(counts))]
        with torch.no_grad():
            found.append(runner.forward(new, lengths[: len(counts)], tables))
        for row, count in enumerate(counts):
            lengths[row] += count
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_graphs_a_kind_of_layer_serve_every_pass(kind: str) -> None:
    """One for a single token, which torch compiles for by itself, and one for more."""
    model = small_model(kind).eval()
    layers = attention_layers(model)
    cache = PagedKVCache(BLOCK).allocate(layers.shapes, 7 * BLOCKS, layers.dtype, model.device)
    with paged_model(model, layers.modules, cache):
        runner = PagedRunner(model, cache)
        expected = logits_of_passes(runner)
        for layer in decoder_layers(model):
            layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        found = logits_of_passes(runner)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2 * len(set(getattr(model.config, "layer_types", None) or [0]))


def test_the_operator_keeps_its_promises() -> None:
    """Schema, fake tensors and mutation, as PyTorch checks them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2, 2))
    keys, values = (torch.randn(2, BLOCK, 2, 8, generator=generator) for _ in range(2))
    reach = OneByOne(starts=(1,), counts=(3,), blocks=(range(1, 2),))
    with step_in_use(InOneRow(torch.arange(5, 8), reach, kernels=False)):
        library.opcheck(
            torch.ops.truthgpt.paged_attention.default,
            (query, key, value, keys, values, 0.3, None, None),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_a_pass_outside_of_a_step_is_an_error() -> None:
    model = small_model("llama")
    layers = attention_layers(model)
    cache = PagedKVCache(BLOCK).allocate(layers.shapes, 2, layers.dtype, model.device)
    with paged_model(model, layers.modules, cache), pytest.raises(AssertionError, match="step_in_use"):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
