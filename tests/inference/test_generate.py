"""Generation: the tokens transformers would write, and nothing else changed by writing them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from truthgpt.errors import ConfigError
from truthgpt.inference.generate import Generation, GenerationSettings, encode_prompt, generate_texts

torch.set_num_threads(1)

EOS = 256
POSITIONS = 48
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": POSITIONS, **HEADS}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": POSITIONS},
    "llama": {"num_hidden_layers": 2, **LAYERS},
    "qwen3": {"num_hidden_layers": 2, **LAYERS},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 8, **LAYERS},
}


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and `<eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{c: i for i, c in enumerate(alphabet)}, "<eos>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZER = byte_tokenizer(eos_token="<eos>")


def small_model(kind: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A model whose choices are clear: random weights of this size would leave every logit near zero."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=EOS + 1, **CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def write(model: PreTrainedModel, prompts: list[str], **changes: Any) -> list[Generation]:
    values = {"max_new_tokens": 12, "temperature": 0.0, "seed": 3, **changes}
    return list(generate_texts(model, TOKENIZER, prompts, GenerationSettings(**values)))


def greedy_by_hand(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Argmax of a full forward, one token at a time."""
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
        if ids[-1] == EOS:
            break
    return ids


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_is_the_argmax_with_and_without_cache(kind: str) -> None:
    model = small_model(kind)
    for prompt in ["def f(", "a", "longer than the sliding window"]:
        ids = TOKENIZER(prompt)["input_ids"]
        expected = greedy_by_hand(model, ids, 12)[len(ids) :]
        for use_cache in (True, False):
            (written,) = write(model, [prompt], use_cache=use_cache)
            assert written.token_ids == expected
            assert written.prompt == prompt
            assert written.text == TOKENIZER.decode(expected, skip_special_tokens=True)


def test_a_prompt_is_sampled_alike_whatever_else_is_in_the_list() -> None:
    model = small_model()
    alone = write(model, ["one"], temperature=1.0)[0].token_ids
    among = write(model, ["zero", "one", "two", "one"], temperature=1.0)
    assert among[1].token_ids == alone
    assert among[3].token_ids != alone  # asked twice: two samples
    assert write(model, ["one"], temperature=1.0, seed=4)[0].token_ids != alone


def test_sampling_is_from_the_tempered_softmax_of_the_whole_vocabulary() -> None:
    """A top-k of 50, transformers' default, could not reach most of 257 nearly equal tokens."""
    model = small_model()
    ids = [write(model, ["x"], temperature=1e4, seed=seed, max_new_tokens=1)[0].token_ids[0] for seed in range(300)]
    assert len(set(ids)) > 120
    cold = write(model, ["x"], temperature=1e-4)[0].token_ids
    assert cold == write(model, ["x"])[0].token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_of_the_caller_is_changed(temperature: float) -> None:
    model = small_model()
    model.train()
    model.transformer.h[1].eval()
    own = model.generation_config
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    settings = GenerationSettings(max_new_tokens=4, temperature=temperature, seed=1)
    for _ in generate_texts(model, TOKENIZER, ["a", "b"], settings):  # between two results, too
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training and model.transformer.h[0].training and not model.transformer.h[1].training
        assert model.generation_config is own
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_dropout_is_off() -> None:
    model = small_model()
    model.train()
    assert len({tuple(write(model, ["abc"])[0].token_ids) for _ in range(3)}) == 1


def test_the_random_state_is_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.train()
    own, before = model.generation_config, torch.get_rng_state()

    def fail(*arguments: Any, **keywords: Any) -> None:
        torch.rand(3)
        raise RuntimeError("no")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        write(model, ["a"], temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.generation_config is own


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


def test_stops_at_the_end_of_text() -> None:
    (written,) = write(favouring(EOS), ["abc"])
    assert (written.token_ids, written.text) == ([EOS], "")


def test_an_architectures_default_end_token_is_an_ordinary_byte_here() -> None:
    model = favouring(2)
    assert model.generation_config.eos_token_id == 2  # LlamaConfig's default
    (written,) = write(model, ["abc"])
    assert written.token_ids == [2] * 12


def test_an_end_token_that_came_with_the_weights_stops() -> None:
    model = favouring(7)
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert write(model, ["abc"])[0].token_ids == [7]


def test_the_models_own_generation_config_is_not_obeyed() -> None:
    model = small_model()
    expected = write(model, ["abc"])[0].token_ids
    sampled = write(model, ["abc"], temperature=1.0)[0].token_ids
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, max_length=2, suppress_tokens=expected, min_new_tokens=3
    )
    assert write(model, ["abc"])[0].token_ids == expected
    assert write(model, ["abc"], temperature=1.0)[0].token_ids == sampled


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
def test_no_warning_is_printed(prompt: str, temperature: float, library_lines: list[str]) -> None:
    model = small_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, [prompt], temperature=temperature, max_new_tokens=60)
    assert library_lines == []


def lengths_fed(model: PreTrainedModel) -> list[int]:
    """Grows by the number of tokens of every forward pass."""
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    return lengths


def test_the_cache_is_used_exactly_when_asked_for() -> None:
    model = small_model("llama")
    model.config.use_cache = False  # as training sets it
    fed = lengths_fed(model)
    write(model, ["abc"], max_new_tokens=4)
    assert fed == [3, 1, 1, 1]
    fed.clear()
    model.config.use_cache = True
    write(model, ["abc"], max_new_tokens=4, use_cache=False)
    assert fed == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "written"),
    [(40, 9, 9), (40, 10, 9), (POSITIONS, 5, 1), (POSITIONS + 1, 5, 5), (100, 100, POSITIONS // 2 + 1), (1, 99, 48)],
)
def test_never_more_positions_than_the_model_has(
    kind: str, prompt_tokens: int, asked: int, written: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model(kind)
    fed = lengths_fed(model)
    prompt = "".join(chr(97 + n % 26) for n in range(prompt_tokens))
    with caplog.at_level(logging.INFO, logger="truthgpt"):
        (result,) = write(model, [prompt], max_new_tokens=asked, use_cache=False)
    assert max(fed) <= POSITIONS
    assert len(result.token_ids) == written or result.token_ids[-1] == EOS
    fits = prompt_tokens + asked - 1 <= POSITIONS
    assert len(caplog.records) == (0 if fits else 1)


def test_a_long_prompt_keeps_its_end() -> None:
    model = small_model()
    ending = "the end of the story is"  # fits with 12 new tokens, as does what is kept of the long one
    long = "something else altogether, " * 5 + ending
    kept = TOKENIZER(long)["input_ids"][-(POSITIONS + 1 - 12) :]
    expected = greedy_by_hand(model, kept, 12)[len(kept) :]
    assert write(model, [long])[0].token_ids == expected


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
    settings = GenerationSettings(max_new_tokens=2, temperature=0.0, seed=0)
    (written,) = generate_texts(favouring(2), tokenizer, ["one"], settings)
    assert written.token_ids == [2, 2]
    assert written.text == " two two"
    assert tokenizer.decode([2, 2]) == "two two"


def test_a_compiled_model_is_not_recompiled_for_decoding() -> None:
    model = small_model("llama")
    expected = write(model, ["abc"])[0].token_ids
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert write(model, ["abc"])[0].token_ids == expected
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
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        GenerationSettings(**{"max_new_tokens": 1, "temperature": 0.0, "seed": 0, **values})  # type: ignore[arg-type]


def test_another_models_tokenizer_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=40, **CONFIGS["gpt2"]))
    with pytest.raises(ConfigError, match="vocabulary of 40"):
        write(model, ["zzz"])


def test_no_prompts_give_nothing() -> None:
    assert write(small_model(), []) == []
