"""Models whose tokens see those that they are to predict are no language models."""

from __future__ import annotations

import pytest
import torch
from tests.inference.small_models import CONFIGS, FURTHER, small_model

from truthgpt.attention.probe import LEAK_TOLERANCE, future_error
from truthgpt.build_attention import check_causal
from truthgpt.errors import ConfigError
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_model_that_sees_what_it_predicts_is_refused(model_type: str, dtype: torch.dtype) -> None:
    for decoder in (False, True):
        values = {"model_type": model_type, **ENCODER, "vocab_size": 257, "is_decoder": decoder}
        model = build_causal_lm(load_architecture(None, values, trust_remote_code=False), "sdpa", 0, dtype).train()
        if decoder:
            check_causal(model)
        else:
            with pytest.raises(ConfigError, match=r"(LMHeadModel|CausalLM) see those after .*is_decoder: true"):
                check_causal(model)
        assert model.training and {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("family", [*CONFIGS, *FURTHER])
def test_causal_models_are_taken(family: str) -> None:
    assert future_error(small_model(family)) <= LEAK_TOLERANCE
