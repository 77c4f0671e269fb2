"""Generation: the tokens transformers would write, with every cache, and nothing else changed by writing them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.inference.small_models import (
    CONFIGS,
    EOS,
    POSITIONS,
    TOKENIZER,
    byte_tokenizer,
    greedy_by_hand,
    small_model,
)
from tests.plugins.reference_attention import reference_attention
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.attention.install import install_attention
from truthgpt.errors import ConfigError
from truthgpt.inference.conversation import Conversation
from truthgpt.inference.engine import Engine
from truthgpt.inference.generate import Generation, encode_prompt, generate_texts
from truthgpt.inference.open_engine import EngineOptions, open_engine
from truthgpt.inference.request import Sampling
from truthgpt.kv_cache.base import KVCachePolicy
from truthgpt.kv_cache.none import NoKVCache
from truthgpt.kv_cache.paged import PagedKVCache
from truthgpt.runtime.fallbacks import Fallbacks

torch.set_num_threads(1)


@dataclass(frozen=True)
class TransformersOwn:
    """What stands in for the paged cache where a model cannot use it."""

    keeps: bool = True


CACHES: dict[str, KVCachePolicy] = {"paged": PagedKVCache(4), "own": TransformersOwn(), "none": NoKVCache()}
every_cache = pytest.mark.parametrize("cache", CACHES)


@contextmanager
def opened(model: PreTrainedModel, cache: str = "paged", tokenizer: Any = TOKENIZER) -> Iterator[Engine]:
    fallbacks = Fallbacks(strict=True)
    with open_engine(model, tokenizer, CACHES[cache], fallbacks, EngineOptions(2**20)) as engine:
        yield engine
        if not engine.has_work:
            assert engine.load().cache_used_tokens == 0


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 12, "temperature": 0.0, "seed": 3, **changes})


def write(model: PreTrainedModel, prompts: list[str], cache: str = "paged", **changes: Any) -> list[Generation]:
    with opened(model, cache) as engine:
        return list(generate_texts(engine, TOKENIZER, prompts, sampling(**changes)))


@pytest.mark.parametrize("kind", CONFIGS)
@every_cache
def test_greedy_is_the_argmax_with_and_without_cache(cache: str, kind: str) -> None:
    model = small_model(kind)
    prompts = ["def f(", "a", "longer than the sliding window"]
    results = write(model, prompts, cache)
    assert [result.prompt for result in results] == prompts
    for result in results:
        ids = TOKENIZER(result.prompt)["input_ids"]
        expected = greedy_by_hand(model, ids, 12)[len(ids) :]
        assert result.token_ids == expected
        assert result.text == TOKENIZER.decode(expected, skip_special_tokens=True)
        assert result.finish == ("stop" if expected[-1] == EOS else "length")
        assert write(model, [result.prompt], cache) == [result], "alone"


@every_cache
def test_a_prompt_is_sampled_alike_whatever_else_is_in_the_list(cache: str) -> None:
    model = small_model()
    alone = write(model, ["one"], cache, temperature=1.0)[0].token_ids
    among = write(model, ["zero", "one", "two", "one"], cache, temperature=1.0)
    assert among[1].token_ids == alone
    assert among[3].token_ids != alone  # asked twice: two samples
    assert write(model, ["one"], cache, temperature=1.0, seed=4)[0].token_ids != alone


def test_every_cache_samples_the_same_text() -> None:
    model = small_model()
    first, *others = (write(model, ["one", "two"], cache, temperature=1.0) for cache in CACHES)
    assert others == [first, first]


def test_sampling_is_from_the_tempered_softmax_of_the_whole_vocabulary() -> None:
    """A top-k of 50, transformers' default, could not reach most of 257 nearly equal tokens."""
    model = small_model()
    ids = [write(model, ["x"], temperature=1e4, seed=seed, max_new_tokens=1)[0].token_ids[0] for seed in range(300)]
    assert len(set(ids)) > 120
    cold = write(model, ["x"], temperature=1e-4)[0].token_ids
    assert cold == write(model, ["x"])[0].token_ids


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All of a model that generating could change, and the random state."""
    return {
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "attention": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "generation config": (id(model.generation_config), model.generation_config.to_dict()),
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
    }


def trained_with(attention: str) -> PreTrainedModel:
    """A model as it stands in training, some of it frozen and in evaluation mode."""
    model = small_model()
    if attention == "own":
        model.set_attn_implementation(install_attention("own", reference_attention))
    model.train()
    model.config.use_cache = False
    model.transformer.h[1].eval()
    torch.manual_seed(11)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("attention", ["sdpa", "own"])
@every_cache
def test_nothing_of_the_caller_is_changed(cache: str, attention: str, temperature: float) -> None:
    model = trained_with(attention)
    before = state_of(model)
    with opened(model, cache) as engine:
        for _ in generate_texts(engine, TOKENIZER, ["a", "b"], sampling(max_new_tokens=4, temperature=temperature)):
            within = state_of(model)  # between two results, too
            assert all(within[part] == before[part] for part in ("generation config", "weights", "random"))
            assert not any(within["modes"])
    assert state_of(model) == before


@every_cache
def test_dropout_is_off(cache: str) -> None:
    model = small_model()
    model.train()
    assert len({tuple(write(model, ["abc"], cache)[0].token_ids) for _ in range(3)}) == 1


@pytest.mark.parametrize("attention", ["sdpa", "own"])
@every_cache
def test_the_model_is_as_before_after_an_error(cache: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_with(attention)
    before = state_of(model)

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), opened(model, cache) as engine:
        monkeypatch.setattr(model.transformer, "forward", fail)
        list(generate_texts(engine, TOKENIZER, ["a"], sampling(temperature=1.0)))
    monkeypatch.undo()
    assert state_of(model) == before


def favouring(token: int) -> PreTrainedModel:
    """A model that always writes `token`."""
    model = small_model("llama")
    head = torch.nn.Linear(32, EOS + 1, bias=True)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[token] = 10.0
    model.lm_head = head
    return model


@every_cache
def test_stops_at_the_end_of_text(cache: str) -> None:
    (written,) = write(favouring(EOS), ["abc"], cache)
    assert (written.token_ids, written.text, written.finish) == ([EOS], "", "stop")


def test_an_architectures_default_end_token_is_an_ordinary_byte_here() -> None:
    model = favouring(2)
    assert model.generation_config.eos_token_id == 2  # LlamaConfig's default
    (written,) = write(model, ["abc"])
    assert written.token_ids == [2] * 12


def test_an_end_token_that_came_with_the_weights_stops() -> None:
    model = favouring(7)
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert write(model, ["abc"])[0].token_ids == [7]


@every_cache
def test_the_models_own_generation_config_is_not_obeyed(cache: str) -> None:
    model = small_model()
    expected = write(model, ["abc"], cache)[0].token_ids
    sampled = write(model, ["abc"], cache, temperature=1.0)[0].token_ids
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, max_length=2, suppress_tokens=expected, min_new_tokens=3
    )
    assert write(model, ["abc"], cache)[0].token_ids == expected
    assert write(model, ["abc"], cache, temperature=1.0)[0].token_ids == sampled


@pytest.fixture
def library_lines() -> Iterator[list[str]]:
    """What transformers logs; its own handler is bound to the stderr of the time it was imported."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Collector()
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    yield lines
    library.removeHandler(handler)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("prompt", ["abc", "", "x" * (POSITIONS + 5)])
@every_cache
def test_no_warning_is_printed(cache: str, prompt: str, temperature: float, library_lines: list[str]) -> None:
    model = small_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, [prompt], cache, temperature=temperature, max_new_tokens=60)
    assert library_lines == []


def lengths_fed(model: PreTrainedModel) -> list[int]:
    """Grows by the number of tokens of every forward pass."""
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    return lengths


@pytest.mark.parametrize(
    ("cache", "expected"), [("paged", [3, 1, 1, 1]), ("own", [3, 1, 1, 1]), ("none", [3, 4, 5, 6])]
)
@pytest.mark.parametrize("configured", [True, False])  # training sets use_cache: false
def test_the_cache_is_used_exactly_when_asked_for(cache: str, expected: list[int], configured: bool) -> None:
    model = small_model("llama")
    model.config.use_cache = configured
    with opened(model, cache) as engine:
        fed = lengths_fed(model)
        list(generate_texts(engine, TOKENIZER, ["abc"], sampling(max_new_tokens=4)))
    assert fed == expected


def positions_seen(model: PreTrainedModel) -> list[int]:
    """Grows by the last position of every forward pass."""
    seen: list[int] = []

    def note(_: torch.nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        positions = [value for value in (*inputs, *keywords.values()) if value.dtype == torch.long]
        seen.append(int(positions[0].max()))

    positions = model.transformer.wpe if hasattr(model, "transformer") else model.model.rotary_emb
    positions.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "written"),
    [(40, 9, 9), (40, 10, 9), (POSITIONS, 5, 1), (POSITIONS + 1, 5, 5), (100, 100, POSITIONS // 2 + 1), (1, 99, 48)],
)
@every_cache
def test_never_more_positions_than_the_model_has(
    cache: str, kind: str, prompt_tokens: int, asked: int, written: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(kind)
    seen = positions_seen(model)
    prompt = "".join(chr(97 + n % 26) for n in range(prompt_tokens))
    with caplog.at_level(logging.INFO, logger="truthgpt"):
        (result,) = write(model, [prompt], cache, max_new_tokens=asked)
    assert max(seen) < POSITIONS
    assert len(result.token_ids) == written or result.token_ids[-1] == EOS
    assert result.finish == ("stop" if result.token_ids[-1] == EOS else "length")
    fits = prompt_tokens + asked - 1 <= POSITIONS
    said = [record for record in caplog.records if record.name.startswith("truthgpt")]
    assert len(said) == (0 if fits else 1)
    assert fits or f"writing at most {written} of {asked} new ones" in caplog.text


def test_a_long_prompt_keeps_its_end() -> None:
    model = small_model()
    ending = "the end of the story is"  # fits with 12 new tokens, as does what is kept of the long one
    long = "something else altogether, " * 5 + ending
    kept = TOKENIZER(long)["input_ids"][-(POSITIONS + 1 - 12) :]
    expected = greedy_by_hand(model, kept, 12)[len(kept) :]
    assert write(model, [long])[0].token_ids == expected


@pytest.mark.parametrize("prompt", ["before \udcff", "\ud800"])
def test_what_is_no_text_is_refused(prompt: str) -> None:
    refused = r"the prompt is no text at '(before )?\\u\w{4}': bytes that are not UTF-8"
    for template in (None, "{{ messages[0].content }}"):
        conversation = Conversation(byte_tokenizer(chat_template=template), None)
        conversation.say("user", prompt)
        with pytest.raises(ConfigError, match=refused):
            conversation.prompt(1)
    with pytest.raises(ConfigError, match=refused):
        encode_prompt(TOKENIZER, prompt)


def test_an_empty_prompt_starts_from_bos_or_eos() -> None:
    assert encode_prompt(TOKENIZER, "") == [EOS]
    assert encode_prompt(byte_tokenizer(bos_token="<eos>"), "") == [EOS]
    with pytest.raises(ConfigError, match="the prompt is empty"):
        encode_prompt(byte_tokenizer(), "")
    model = small_model()
    assert write(model, [""])[0].token_ids == greedy_by_hand(model, [EOS], 12)[1:]


def test_an_end_token_the_tokenizer_adds_is_left_out() -> None:
    tokenizer = byte_tokenizer(eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    plain = TOKENIZER("ab")["input_ids"]
    assert tokenizer("ab")["input_ids"] == [*plain, EOS]
    assert encode_prompt(tokenizer, "ab") == plain
    assert encode_prompt(TOKENIZER, "ab<eos>") == [*plain, EOS]  # asked for


def test_the_space_after_the_prompt_is_kept() -> None:
    """SentencePiece tokenizers drop the space of a text's first word: not that of a continuation."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with opened(favouring(2), tokenizer=tokenizer) as engine:
        (written,) = generate_texts(engine, tokenizer, ["one"], sampling(max_new_tokens=2))
    assert written.token_ids == [2, 2]
    assert written.text == " two two"
    assert tokenizer.decode([2, 2]) == "two two"


@every_cache
def test_a_compiled_model_is_not_recompiled_for_decoding(cache: str) -> None:
    model = small_model("llama")
    expected = write(model, ["abc"], cache)[0].token_ids
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert write(model, ["abc"], cache)[0].token_ids == expected
    assert compiled == []
    model(torch.zeros(1, 8, dtype=torch.long))
    assert compiled  # training still is compiled


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"repetition_penalty": 1e40}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        sampling(**values)


def test_another_models_tokenizer_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=40, **CONFIGS["gpt2"]))
    with pytest.raises(ConfigError, match="vocabulary of 40"):
        write(model, ["zzz"])


def test_no_prompts_give_nothing() -> None:
    assert write(small_model(), []) == []
