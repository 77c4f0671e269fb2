"""Packed documents on a GPU: variable-length attention without a mask gives what each document gives alone."""

from __future__ import annotations

import pytest
import torch
from tests.attention.packed_models import FAMILIES, VOCABULARY, WINDOW, model_of, packed_batch

from truthgpt.attention.install import transformers_attention_in
from truthgpt.attention.probe import dense_error, packed_errors
from truthgpt.attention.sdpa import packed_mask, sdpa_attention
from truthgpt.data.base import Batch
from truthgpt.models.causal_lm import causal_lm_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(batch: Batch) -> Batch:
    return {key: tensor.cuda() for key, tensor in batch.items()}


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_variable_length_attention_against_float32_math(head_size: int, groups: int, window: int | None) -> None:
    """Values and gradients in bf16, odd lengths, two rows."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    borders = torch.tensor([0, 37, 38, 101, 101 + 64, 202, 202], dtype=torch.int32, device="cuda")
    shapes = [(2, 4, 101, head_size), (2, 4 // groups, 101, head_size), (2, 4 // groups, 101, head_size)]
    exact = [torch.randn(shape, generator=generator, device="cuda", requires_grad=True) for shape in shapes]
    rough = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    output, _ = sdpa_attention(torch.nn.Identity(), *rough, None, sliding_window=window, cu_seq_lens_q=borders)
    query, key, value = exact
    mask = packed_mask(borders, 2, 101, window)
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) / head_size**0.5).masked_fill(~mask, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    assert output.shape == expected.shape
    assert torch.allclose(output.float(), expected, atol=3e-2)
    weight = torch.randn(expected.shape, generator=generator, device="cuda")
    (output.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad.float() - b.grad).abs().max() < 3e-2 * b.grad.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_in_bf16_are_those_of_the_documents_alone(family: str) -> None:
    model = model_of(FAMILIES[family]).cuda().eval()
    batch, alone = packed_batch([[29, 1, 30], [7, 45, 8]])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        _, packed = causal_lm_loss(model, on_gpu(batch))
        with transformers_attention_in(model):
            separate = [model(input_ids=ids.cuda().unsqueeze(0), use_cache=False).logits[0] for ids in alone]
    reference = torch.cat(separate).float()
    assert (packed.flatten(0, 1).float() - reference).abs().max() < 2e-2 * reference.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_exchanging_a_document_leaves_the_others_alone_in_bf16(family: str) -> None:
    model = model_of(FAMILIES[family]).cuda().eval()
    batch, _ = packed_batch([[29, 31]])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :29] = torch.randint(0, VOCABULARY, (1, 29), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits = [causal_lm_loss(model, on_gpu(b))[1] for b in (batch, other)]
    assert torch.equal(logits[0][:, 29:], logits[1][:, 29:])
    assert not torch.equal(logits[0][:, :29], logits[1][:, :29])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probes_accept_every_family(family: str) -> None:
    model = model_of(FAMILIES[family]).cuda()
    assert dense_error(model, 60) < 1e-5
    assert not packed_errors(model, 60).exceeded()
    with torch.autocast("cuda", torch.bfloat16):
        assert not packed_errors(model, 60).exceeded(half_precision=True)


def test_no_step_waits_for_the_gpu() -> None:
    """Nor does it make a mask: neither the model nor the attention reads anything back."""
    model = model_of(FAMILIES["gemma3"]).cuda()
    batch = on_gpu(packed_batch([[29, 31]])[0])
    with torch.autocast("cuda", torch.bfloat16):
        causal_lm_loss(model, batch)[0].backward()  # first use of kernels may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            causal_lm_loss(model, batch)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
