"""The engine on a GPU: graphs, kernels, compiled layers and passes that run ahead write what transformers writes."""

from __future__ import annotations

import random

import pytest
import torch
from tests.gpu.gpu_runs import needs_compiler
from tests.inference.engine_runs import finished, opened
from tests.inference.small_models import EOS, POSITIONS, TOKENIZER, greedy_by_hand, small_model

from truthgpt.inference.engine import EngineLimits
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.inference.request import Sampling
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.fallbacks import Fallbacks

pytestmark = [pytest.mark.gpu, needs_compiler]
KINDS = ("gpt2", "llama", "qwen3", "gemma3_text")
FEW = EngineLimits(sequences=5, prompt_tokens=20)


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(EOS) for _ in range(numbers.randint(1, 20))] for _ in range(count)]


def rooms(prompt: list[int]) -> int:
    return min(6 + len(prompt), POSITIONS + 1 - len(prompt))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_transformers_own_in_float32(kind: str, compiled: bool) -> None:
    """Ragged requests that come and go, and all at once."""
    torch.set_float32_matmul_precision("highest")
    model = small_model(kind).cuda()
    asked = prompts(33)
    expected = [greedy_by_hand(model, list(prompt), rooms(prompt))[len(prompt) :] for prompt in asked]
    for limits in (FEW, EngineLimits()):
        with opened(model, block_size=16, compiled=compiled, limits=limits) as engine:
            ids = [engine.submit(p, Sampling(max_new_tokens=rooms(p), temperature=0.0)) for p in asked]
            answers = finished(engine, ids)
            assert [answers[i].tokens for i in ids] == expected


def test_a_full_cache_changes_no_answer() -> None:
    torch.set_float32_matmul_precision("highest")
    model = small_model("llama").cuda()
    asked = prompts(12)
    found = []
    for blocks in (1000, 6):
        with opened(model, block_size=16, blocks=blocks) as engine:
            ids = [engine.submit(p, Sampling(max_new_tokens=rooms(p), temperature=0.0)) for p in asked]
            answers = finished(engine, ids)
            found.append([answers[i].tokens for i in ids])
    assert found[0] == found[1]


def test_sampled_answers_in_bf16_end_and_leave_nothing() -> None:
    model = small_model("llama").cuda().bfloat16()
    with opened(model, block_size=16, streaming=True) as engine:
        settings = [
            Sampling(max_new_tokens=9, temperature=t, top_k=k, top_p=p) for t, k, p in ((1, 0, 1), (0.7, 5, 0.9))
        ]
        ids = [engine.submit(TOKENIZER("def f")["input_ids"], s) for s in settings * 8]
        answers = finished(engine, ids)
        assert all(0 < len(answers[i].tokens) <= 9 and answers[i].finish for i in ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_reads_values_on_the_host_is_answered_without_graphs(dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    model = small_model("llama").cuda().to(dtype)
    mlp = type(model.model.layers[0].mlp)

    def reads(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        assert float(hidden.abs().max()) >= 0
        return mlp.forward(self, hidden)  # type: ignore[no-any-return]

    for layer in model.model.layers:
        layer.mlp.forward = reads.__get__(layer.mlp)
    asked, fallbacks = prompts(5), Fallbacks()
    with open_engine(model, TOKENIZER, PagedKVCache(16), fallbacks, EngineOptions(2**28)) as engine:
        ids = [engine.submit(p, Sampling(max_new_tokens=rooms(p), temperature=0.0)) for p in asked]
        answers = finished(engine, ids)
    (taken,) = fallbacks.to_json()
    assert taken["used"].startswith("transformers' own cache")
    assert "cannot be recorded as a CUDA graph" in taken["reason"]
    assert all(len(answers[i].tokens) > 0 for i in ids)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(2, device="cuda")  # refused while torch takes the capture for not ended
    if dtype == torch.float32:
        expected = [greedy_by_hand(model, list(prompt), rooms(prompt))[len(prompt) :] for prompt in asked]
        assert [answers[i].tokens for i in ids] == expected
