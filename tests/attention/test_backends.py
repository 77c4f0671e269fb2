"""Attention backends: the right values, the right gradients, and a refusal where a backend would be wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.plugins.reference_attention import reference_attention
from transformers import Gemma3TextConfig, GPT2Config, MistralConfig

from truthgpt.attention.base import capabilities_of, declares
from truthgpt.attention.install import check_attention, install_attention
from truthgpt.attention.sdpa import sdpa_attention
from truthgpt.data.base import Batch
from truthgpt.errors import ConfigError
from truthgpt.models.architecture import load_architecture
from truthgpt.models.causal_lm import build_causal_lm, causal_lm_loss


class Layer(torch.nn.Module):
    """What an attention function may read of the layer that calls it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def random_heads(heads: int, key_heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 9, 8, generator=generator, dtype=dtype)
    key, value = (torch.randn(2, key_heads, 9, 8, generator=generator, dtype=dtype) for _ in range(2))
    return tuple(tensor.requires_grad_() for tensor in (query, key, value))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_sdpa_equals_float64_math(heads: int, key_heads: int, scaling: float | None) -> None:
    exact = random_heads(heads, key_heads, torch.float64)
    rough = tuple(tensor.detach().float().requires_grad_() for tensor in exact)
    layer = Layer(heads // key_heads)
    expected, _ = reference_attention(layer, *exact, None, scaling=scaling)
    output, weights = sdpa_attention(layer, *rough, None, scaling=scaling, dropout=0.0)
    assert output.shape == (2, 9, heads, 8) and weights is None
    assert torch.allclose(output.double(), expected, atol=1e-5)
    expected.square().sum().backward()
    output.square().sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-4)


def test_sdpa_honours_a_mask() -> None:
    query, key, value = random_heads(2, 2, torch.float32)
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    mask[:, :, :, 3] = -math.inf
    mask[:, :, 3, 3] = 0
    output, _ = sdpa_attention(Layer(1), query, key, value, mask, scaling=None, dropout=0.0)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(8) + mask).softmax(-1)
    assert torch.allclose(output, (weights @ value).transpose(1, 2), atol=1e-5)


TINY = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
LLAMA = {"model_type": "llama", **dict(zip(TINY, (32, 64, 2, 4, 2), strict=True)), "vocab_size": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_own_backend_gives_the_loss_of_sdpa(values: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (3, 17), generator=generator)
    batch: Batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    losses, gradients = [], []
    for name, function in (("sdpa", sdpa_attention), ("by_formula", reference_attention)):
        architecture = load_architecture(None, values, trust_remote_code=False)
        model = build_causal_lm(architecture, install_attention(name, function), seed=0).eval()
        loss, _ = causal_lm_loss(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-4), name


def test_own_backend_is_really_called_and_without_a_mask() -> None:
    masks: list[object] = []

    def spy(*tensors: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        masks.append(tensors[4] if len(tensors) > 4 else keywords["attention_mask"])
        return reference_attention(*tensors, **keywords)

    architecture = load_architecture(None, LLAMA, trust_remote_code=False)
    model = build_causal_lm(architecture, install_attention("spy", spy), seed=0)
    ids = torch.zeros(2, 5, dtype=torch.long)
    causal_lm_loss(model, {"input_ids": ids, "labels": ids})
    assert masks == [None, None], "two layers, dense causal rows"


def test_every_backend_has_a_name_of_its_own() -> None:
    assert install_attention("sdpa", sdpa_attention) == "truthgpt_sdpa"
    assert install_attention("mine", reference_attention) == "truthgpt_mine"


def test_capabilities() -> None:
    assert capabilities_of(reference_attention) == {"dense"}
    assert "sliding_window" in capabilities_of(sdpa_attention)

    @declares("dense", "packed")
    def packed() -> None: ...

    assert capabilities_of(packed) == {"dense", "packed"}  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [MistralConfig(sliding_window=16), Gemma3TextConfig(sliding_window=16)])
def test_sliding_window_needs_a_backend_that_has_it(config: Any) -> None:
    with pytest.raises(ConfigError, match="looks back 16 tokens in rows of 17"):
        check_attention("mine", reference_attention, config, 17)
    check_attention("mine", reference_attention, config, 16)
    check_attention("sdpa", sdpa_attention, config, 1000)


@pytest.mark.parametrize("config", [MistralConfig(sliding_window=None), GPT2Config()])
def test_models_without_a_window_are_fine(config: Any) -> None:
    check_attention("mine", reference_attention, config, 100_000)


def test_window_in_force_is_what_is_checked() -> None:
    """Window of w: a token sees itself and w - 1 before it. Rows of w tokens never reach beyond, rows of w + 1 do."""
    window = 4
    values = {**LLAMA, "model_type": "mistral", "sliding_window": window}
    model, by_formula = (
        build_causal_lm(load_architecture(None, values, trust_remote_code=False), name, seed=0).eval()
        for name in ("sdpa", install_attention("dense_only", reference_attention))
    )
    ids = torch.arange(1, window + 2).unsqueeze(0)
    with torch.no_grad():
        short = [m(input_ids=ids[:, :window], use_cache=False).logits for m in (model, by_formula)]
        long = [m(input_ids=ids, use_cache=False).logits for m in (model, by_formula)]
    assert torch.allclose(*short, atol=1e-5)
    assert not torch.allclose(*long, atol=1e-5)
