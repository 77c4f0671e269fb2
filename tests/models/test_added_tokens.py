"""New rows of embeddings and head: how they begin, and that they compute as a resized model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.attention.packed_models import FAMILIES, model_of
from tests.models.adapted_models import SHAPES, adapted, settings
from transformers import PreTrainedModel

from truthgpt.errors import ConfigError
from truthgpt.models.added_tokens import (
    AddedTokens,
    add_saved_rows,
    missing_tokens,
    resize_embeddings,
)
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.models.lora import add_tokens
from truthgpt.models.output_head import head_completes_body
from truthgpt.models.trained_weights import adapter_weights, base_state, check_adapters_are_reached
from truthgpt.optim.groups import parameter_groups
from truthgpt.runtime.precision import hold_frozen_in_bf16

IDS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))
"""With the three new tokens, 64 to 66."""
FAMILIES_HERE = {**SHAPES, "gemma3": {**FAMILIES["gemma3"], "pad_token_id": 3, "tie_word_embeddings": True}}
"""gpt2 and gemma3 are tied; gemma3 scales what it looks up, and has a padding row."""


def extended(base: PreTrainedModel) -> Any:
    model = adapted(base, settings(), share=False)
    add_tokens(model, 3)
    return model


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_computes_what_a_resized_model_does(family: str) -> None:
    base = model_of(FAMILIES_HERE[family]).double()
    model, whole = extended(base).double(), adapted(base, settings(), share=False)
    weights = {name: value for name, value in adapter_weights(model).items() if "token_adapter" in name}
    assert len(weights) == (1 if base.config.tie_word_embeddings else 2)
    for index, value in enumerate(weights.values()):
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)))
    whole.resize_token_embeddings(67, mean_resizing=False)
    rows = list(weights.values())
    whole.get_input_embeddings().weight.data[64:] = rows[0]
    whole.get_output_embeddings().weight.data[64:] = rows[-1]
    whole = whole.double().train()
    for table in (whole.get_input_embeddings(), whole.get_output_embeddings()):
        table.weight.requires_grad_(True)
    found = []
    for one in (model.train(), whole):
        loss, logits = causal_lm_loss(one, {"input_ids": IDS, "labels": IDS.roll(-1, dims=1)})
        loss.backward()
        assert torch.equal(logits(), one(input_ids=IDS).logits) or torch.allclose(logits(), one(input_ids=IDS).logits)
        found.append((loss.detach(), logits().detach()))
    torch.testing.assert_close(found[0], found[1])
    gradients = [m.token_adapter.trainable_tokens_delta.grad for m in model.modules() if isinstance(m, AddedTokens)]
    torch.testing.assert_close(gradients[0], whole.get_input_embeddings().weight.grad[64:])
    torch.testing.assert_close(gradients[-1], whole.get_output_embeddings().weight.grad[64:])
    assert head_completes_body(model)


@pytest.mark.parametrize("family", SHAPES)
def test_begin_as_the_mean_below_a_base_that_stays(family: str) -> None:
    base = model_of(SHAPES[family])
    model = extended(base)
    below = base_state(model)
    assert below.keys() == base.state_dict().keys()
    assert all(torch.equal(below[name], value) for name, value in base.state_dict().items())
    table = base.get_input_embeddings().weight
    torch.testing.assert_close(model.get_input_embeddings().weight[64:], table.mean(0).expand(3, -1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_weights(model))
    rows = [id(p) for name, p in model.named_parameters() if "token_adapter" in name]
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    assert rows and not decayed & set(rows), "rows of embeddings do not decay"
    hold_frozen_in_bf16(model)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_weights(model).values()} == {torch.float32}
    check_adapters_are_reached(model.zero_grad() or trained_once(model))


def trained_once(model: Any) -> Any:
    loss, _ = causal_lm_loss(model, {"input_ids": IDS, "labels": IDS.roll(-1, dims=1)})
    loss.backward()
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a_model_that_is_trained_whole_is_resized(family: str) -> None:
    base = model_of(FAMILIES_HERE[family]).eval()
    model = copy.deepcopy(base)
    assert missing_tokens(model, 64) == missing_tokens(model, 60) == 0 and missing_tokens(model, 67) == 3
    torch.manual_seed(5)
    before = torch.get_rng_state()
    resize_embeddings(model, 67)
    assert torch.equal(before, torch.get_rng_state())
    assert missing_tokens(model, 67) == 0 and model.config.vocab_size == 67
    tied = base.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for own, old in (
        (model.get_input_embeddings(), base.get_input_embeddings()),
        (model.get_output_embeddings(), base.get_output_embeddings()),
    ):
        assert torch.equal(own.weight[:64], old.weight)
        torch.testing.assert_close(own.weight[64:], old.weight.mean(0).expand(3, -1))
    known = IDS.clamp(max=63)
    torch.testing.assert_close(model(input_ids=known).logits[..., :64], base(input_ids=known).logits)


def test_head_with_a_bias() -> None:
    shape = {"model_type": "phi", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = model_of({**shape, "num_attention_heads": 4, "vocab_size": 64})
    with pytest.raises(ConfigError, match=r"model.tokenizer: has 3 tokens more than the model, whose output head has"):
        extended(base)
    resize_embeddings(base, 67)
    bias = base.get_output_embeddings().bias
    torch.testing.assert_close(bias[64:], bias[:64].mean().expand(3))


@pytest.mark.parametrize(
    ("saved", "fits"),
    [
        (None, True),
        ({"embed_tokens": [64, 65], "lm_head": [64, 65]}, True),
        ({"model.embed_tokens": [64, 65], "lm_head": [64, 65]}, True),
        ({"embed_tokens": [62, 65], "lm_head": [62, 65]}, False),
        ({"embed_tokens": [64, 65]}, False),
        ([64, 65], False),
        ({"embed_tokens": [64, 65], "lm_head": [64]}, False),
    ],
)
def test_rows_that_adapters_may_have(saved: Any, fits: bool) -> None:
    model = model_of(SHAPES["llama"])
    if not fits:
        with pytest.raises(ValueError, match="train tokens that the base model has"):
            add_saved_rows(model, saved)
        return
    add_saved_rows(model, saved)
    assert missing_tokens(model, 66) == (2 if saved is None else 0)
    tied = model_of(SHAPES["gpt2"])
    add_saved_rows(tied, [64, 65])
    assert missing_tokens(tied, 66) == 0
