"""The head is looked at in float32, whatever type the model is held in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.attention.packed_models import COMMON, model_of

from truthgpt.models.output_head import head_completes_body

SCALED = {
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 1.0},
}


@pytest.mark.parametrize("family", SCALED)
def test_models_held_in_bf16(family: str) -> None:
    sizes = {name: value for name, value in COMMON.items() if name != "head_dim"}
    model = model_of({"model_type": family, **sizes, **SCALED[family]}, "eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    types = set()

    def note(layer: Any, arguments: tuple[torch.Tensor]) -> None:
        types.add(arguments[0].dtype)

    model.get_output_embeddings().register_forward_pre_hook(note)
    assert head_completes_body(model)
    assert types == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
