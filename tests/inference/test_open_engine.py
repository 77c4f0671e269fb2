"""Which cache a model gets: the paged one where it is right, as measured; else its own, said in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.inference.engine_runs import answers
from tests.inference.small_models import EOS, LAYERS, TOKENIZER, greedy_by_hand, small_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import truthgpt.attention.paged
import truthgpt.inference.open_engine
import truthgpt.inference.paged_runner
from truthgpt.attention.paged import InOneRow, paged_attention
from truthgpt.errors import ConfigError
from truthgpt.inference.engine import EngineLimits
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.inference.paged_runner import PagedRunner
from truthgpt.inference.request import Sampling
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.cuda_graph import CaptureError
from truthgpt.runtime.fallbacks import Fallbacks

torch.set_num_threads(1)

PROMPTS = [list(b"def f("), list(b"a"), list(range(97, 120)), list(range(97, 109)), list(range(60, 85))]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
LONG = {**LAYERS, "max_position_embeddings": 128, "num_hidden_layers": 2}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


def made(model_type: str, **values: Any) -> PreTrainedModel:
    """A model whose choices are clear, of any type."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=EOS + 1, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def by_hand(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy_by_hand(model, prompt, 8)[len(prompt) :] for prompt in prompts]


def bloom() -> PreTrainedModel:
    return made("bloom", hidden_size=32, n_layer=2, n_head=2)


def mamba() -> PreTrainedModel:
    return made("mamba", hidden_size=32, num_hidden_layers=2)


def recurrent_gemma() -> PreTrainedModel:
    return made("recurrent_gemma", **LONG | {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32})


def values_of_another_size() -> PreTrainedModel:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    return made("deepseek_v3", **LONG | ranks | {"first_k_dense_replace": 2, "head_dim": 8})


def window_told_to_the_mask_alone() -> PreTrainedModel:
    return made("phimoe", **LONG | EXPERTS | {"sliding_window": 50, "pad_token_id": 0})


def longrope() -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 10_000.0, **factors}
    return made("phi3", **LONG | {"rope_parameters": rope, "pad_token_id": 0, "eos_token_id": EOS})


NOT_OURS = {"transformers.integrations.hub_kernels", "transformers.modeling_rope_utils"}
"""What transformers says of these models on its own."""
OTHERWISE: dict[Callable[[], PreTrainedModel], str] = {
    bloom: "not every layer of BloomForCausalLM attends through transformers' interface",
    mamba: "not every layer of MambaForCausalLM attends",
    recurrent_gemma: "not every layer of RecurrentGemmaForCausalLM attends",
    values_of_another_size: "keys and values of DeepseekV3ForCausalLM differ in size",
    window_told_to_the_mask_alone: "the logits of PhimoeForCausalLM would be off by",
    longrope: "one long sequence changes the positions of all others in Phi3ForCausalLM",
}


@pytest.mark.parametrize("make", OTHERWISE, ids=lambda make: make.__name__)
def test_models_that_cannot_use_it_keep_their_own(
    make: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model, fallbacks = make(), Fallbacks()
    prompts = [*PROMPTS, list(range(40, 100))]  # the last is longer than the window of 50
    expected = by_hand(model, prompts)
    attention = model.config._attn_implementation
    limits = EngineLimits(sequences=4, prompt_tokens=9)
    with (
        caplog.at_level(logging.WARNING, logger="truthgpt"),
        open_engine(model, TOKENIZER, PagedKVCache(4), fallbacks, EngineOptions(2**20, limits=limits)) as engine,
    ):
        assert answers(engine, prompts, GREEDY) == expected
        assert engine.load().cache_tokens == 0
    (record,) = [record for record in caplog.records if record.name not in NOT_OURS]
    assert "model.kv_cache.type: using transformers' own cache" in record.message
    assert OTHERWISE[make] in record.message and "\n" not in record.message
    assert [taken["wanted"] for taken in fallbacks.to_json()] == ["paged"]
    assert model.config._attn_implementation == attention
    with (
        pytest.raises(ConfigError, match=r"model.kv_cache.type: paged cannot be used: .* \(strict: true allows"),
        open_engine(model, TOKENIZER, PagedKVCache(4), Fallbacks(strict=True)),
    ):
        raise AssertionError("opened")
    assert model.config._attn_implementation == attention


def test_a_pass_that_cannot_be_captured_is_seen_at_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's last token runs as those of answers do, by a graph on a GPU."""
    make, model, fallbacks = PagedRunner.__init__, made("llama", **LONG), Fallbacks()
    expected = by_hand(model, PROMPTS)

    def refuse(*arguments: Any) -> torch.Tensor:
        raise CaptureError("it cannot be captured as a CUDA graph")

    def with_graphs(self: PagedRunner, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        monkeypatch.setattr(self, "_graphs", SimpleNamespace(logits=refuse))

    monkeypatch.setattr(PagedRunner, "__init__", with_graphs)
    with open_engine(model, TOKENIZER, PagedKVCache(4), fallbacks) as engine:
        assert answers(engine, PROMPTS, GREEDY) == expected
    (taken,) = fallbacks.to_json()
    assert "LlamaForCausalLM cannot run with it: it cannot be captured" in taken["reason"]


def test_a_window_that_the_samples_do_not_reach_is_no_obstacle() -> None:
    """Of the same model, with as many positions as its window has."""
    model = made("phimoe", **LONG | EXPERTS | {"sliding_window": 128, "pad_token_id": 0})
    expected = by_hand(model, PROMPTS)
    with open_engine(model, TOKENIZER, PagedKVCache(4), Fallbacks(strict=True), EngineOptions(2**22)) as engine:
        assert answers(engine, PROMPTS, GREEDY) == expected


def test_a_model_that_views_its_heads_as_one_can_use_it() -> None:
    """Attention functions return their output in one piece, as transformers' own do."""
    model = made("afmoe", **LONG | EXPERTS | {"num_dense_layers": 1, "num_attention_heads": 4, "head_dim": 8})
    expected = by_hand(model, PROMPTS)
    with open_engine(model, TOKENIZER, PagedKVCache(4), Fallbacks(strict=True), EngineOptions(2**22)) as engine:
        assert answers(engine, PROMPTS, GREEDY) == expected


def wrong_scale(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output * 1.01


def wrong_for_one_token(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output * 1.01 if output.shape[1] == 1 else output


def wrong_behind_others(output: torch.Tensor, paged: Any) -> torch.Tensor:
    return output.flip(1) if isinstance(paged, InOneRow) and paged.reach.starts[0] > 0 else output


def not_a_number(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output * float("nan")


@pytest.mark.parametrize("spoil", [wrong_scale, wrong_for_one_token, wrong_behind_others, not_a_number])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attention_that_is_wrong_is_found_before_it_is_used(
    kind: str, spoil: Callable[[torch.Tensor, Any], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        return spoil(paged_attention(*arguments, **keywords)[0], truthgpt.attention.paged._in_use.step), None

    monkeypatch.setattr(truthgpt.inference.paged_runner, "paged_attention", wrong)
    model, fallbacks = small_model(kind), Fallbacks()
    with open_engine(model, TOKENIZER, PagedKVCache(4), fallbacks, EngineOptions(2**20)) as engine:
        assert answers(engine, PROMPTS, GREEDY) == by_hand(model, PROMPTS)
    (taken,) = fallbacks.to_json()
    assert "would be off by" in taken["reason"]
    with (
        pytest.raises(ConfigError, match="would be off by"),
        open_engine(model, TOKENIZER, PagedKVCache(4), Fallbacks(strict=True)),
    ):
        raise AssertionError("opened")


def test_the_probe_is_not_misled_by_products_in_low_precision() -> None:
    """TF32, which training allows by default, is off by more than the probe tolerates."""
    model = small_model()
    precisions: list[str] = []
    model.register_forward_hook(lambda *_: precisions.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with open_engine(model, TOKENIZER, PagedKVCache(4), Fallbacks(strict=True), EngineOptions(2**20)):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(precisions) == 5 and set(precisions[1:]) == {"highest"}


def test_a_cache_too_small_for_one_block_is_refused() -> None:
    """A block of 8 positions of 2 layers, keys and values of 32 numbers of 4 bytes."""
    needed = 8 * 2 * 2 * 32 * 4
    with open_engine(small_model(), TOKENIZER, PagedKVCache(8), Fallbacks(), EngineOptions(needed)) as engine:
        assert engine.load().cache_tokens == 8
    message = f"a block of 8 positions takes {needed:,} bytes, the cache has {needed - 1:,}: give it more memory"
    with (
        pytest.raises(ConfigError, match=message),
        open_engine(small_model(), TOKENIZER, PagedKVCache(8), Fallbacks(), EngineOptions(needed - 1)),
    ):
        raise AssertionError("opened")


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of_one = 8 * 2 * 2 * 32 * 4
    monkeypatch.setattr(truthgpt.inference.open_engine, "free_memory_bytes", lambda _: 10 * of_one)
    message = f"is to take {11 * of_one:,} bytes, cpu has {10 * of_one:,} free: give it less"
    model, cache = small_model(), PagedKVCache(8)
    with (
        pytest.raises(ConfigError, match=message),
        open_engine(model, TOKENIZER, cache, Fallbacks(), EngineOptions(11 * of_one)),
    ):
        raise AssertionError("opened")
    with open_engine(model, TOKENIZER, cache, Fallbacks(), EngineOptions(11 * of_one), lengths=[80]) as engine:
        assert engine.load().cache_tokens == 80


@pytest.mark.parametrize(("lengths", "positions"), [([10, 3], 16), ([16], 16), ([10_000_000], 64)])
def test_the_cache_is_no_larger_than_what_it_is_for(lengths: list[int], positions: int) -> None:
    of_one = 8 * 2 * 2 * 32 * 4
    with open_engine(
        small_model(), TOKENIZER, PagedKVCache(8), Fallbacks(), EngineOptions(8 * of_one), lengths=lengths
    ) as engine:
        assert engine.load().cache_tokens == {16: sum(-(-n // 8) * 8 for n in lengths), 64: 64}[positions]
