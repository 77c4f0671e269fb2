"""A frozen base in NF4: what its weights become, and that loss and gradients are those of these weights as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.attention.packed_models import model_of
from tests.models import adapted_models
from tests.models.adapted_models import IDS, adapted, differences, loss_and_gradients, settings
from torch import nn

from truthgpt.errors import ConfigError
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import load_causal_lm
from truthgpt.models.lora import Method
from truthgpt.models.output_head import head_completes_body
from truthgpt.models.quantized_base import is_quantized, matrix
from truthgpt.models.trained_weights import load_trained_state, trained_state
from truthgpt.runtime.precision import in_float32

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""The values of the paper's appendix E."""


WIDER = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SHAPES = {
    name: {**values, **({"n_embd": 64} if name == "gpt2" else WIDER)} for name, values in adapted_models.SHAPES.items()
}


def quantized(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: int) -> Any:
    model_of({**SHAPES[family], **changes}, "sdpa").save_pretrained(folder)
    architecture = load_architecture(str(folder), {}, trust_remote_code=False)
    return load_causal_lm(str(folder), architecture, "sdpa", False, dtype, CPU)


def held_plainly(model: Any) -> Any:
    """`model` with float32 linear layers of the weights that its quantised ones have."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            weight = matrix(layer).float()
            plain = nn.Linear(*reversed(weight.shape), bias=layer.bias is not None)
            plain.weight.data = weight
            if layer.bias is not None:
                plain.bias.data = layer.bias.data.float()
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("family", SHAPES)
def test_weights_are_the_nearest_of_sixteen(tmp_path: Path, family: str) -> None:
    """In blocks of 64, each divided by its largest weight, which is itself kept in eight bits."""
    model = quantized(tmp_path, family)
    plain = dict(model_of(SHAPES[family]).named_parameters())
    layers = {name: layer for name, layer in model.named_modules() if is_quantized(layer)}
    assert len(layers) == (3 * 4 if family == "gpt2" else 4 * 7)
    for name, layer in layers.items():
        own = plain[f"{name}.weight"].detach()
        blocks = (own.T if family == "gpt2" else own).reshape(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = NF4[(blocks[..., None] / largest[..., None] - NF4).abs().argmin(-1)] * largest
        assert matrix(layer).shape == (own.T if family == "gpt2" else own).shape
        error = (matrix(layer).reshape(-1, 64) - nearest).abs() / largest
        assert float(error.max()) < 0.02 and float(error.mean()) < 0.005, name


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", SHAPES)
def test_loss_and_gradients_are_those_of_its_weights(tmp_path: Path, family: str, method: Method) -> None:
    base, wanted = quantized(tmp_path, family), settings(method=method)
    ours, plain = adapted(base, wanted), adapted(held_plainly(base), wanted)
    load_weights(plain, ours)
    assert max(differences(loss_and_gradients(ours), loss_and_gradients(plain))) < 1e-4


def load_weights(target: Any, source: Any) -> None:
    trained = {name: p for name, p in source.named_parameters() if p.requires_grad}
    for name, parameter in target.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(trained[name].data)


def test_probes_compute_in_float32(tmp_path: Path) -> None:
    model = quantized(tmp_path, "llama", torch.bfloat16).eval()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer.weight.quant_state.dtype = torch.float32
    exact = nn.functional.linear(x, matrix(layer))
    layer.weight.quant_state.dtype = torch.bfloat16
    rough = layer(x)
    with in_float32(model):
        assert torch.allclose(layer(x), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), rough) and not torch.allclose(rough, exact, rtol=1e-4, atol=1e-5)
    assert head_completes_body(model)


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """bitsandbytes 0.50 gives back other weights than it took, on a CPU."""
    with pytest.raises(ConfigError, match=r"q_proj has 32 inputs, and on a CPU bitsandbytes needs a multiple of 64"):
        quantized(tmp_path, "llama", hidden_size=32)


def test_evaluation_computes_what_training_does(tmp_path: Path) -> None:
    """bitsandbytes would repack the weights for a product of its own."""
    model = quantized(tmp_path, "llama", torch.bfloat16)
    trained = model.train()(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, trained)
        assert torch.equal(model.train()(input_ids=IDS).logits, trained)


def test_adapters_know_their_base(tmp_path: Path) -> None:
    first, again = (adapted(quantized(tmp_path, "llama"), settings(), trained=trained) for trained in (True, False))
    load_trained_state(again, trained_state(first))
    assert torch.equal(again(input_ids=IDS).logits, first(input_ids=IDS).logits)
