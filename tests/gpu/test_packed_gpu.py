"""Packed documents on a GPU: variable-length attention without a mask gives what each document gives alone."""

from __future__ import annotations

import pytest
import torch
from tests.attention.packed_models import FAMILIES, VOCABULARY, WINDOW, model_of, packed_batch

from truthgpt.attention.flash import flash_attention
from truthgpt.attention.install import transformers_attention_in
from truthgpt.attention.masks import packed_mask
from truthgpt.attention.probe import dense_error, packed_errors
from truthgpt.attention.sdpa import sdpa_attention
from truthgpt.attention.triton_attention import triton_attention
from truthgpt.data.base import Batch
from truthgpt.models.causal_lm import causal_lm_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(batch: Batch) -> Batch:
    return {key: tensor.cuda() for key, tensor in batch.items()}


BACKENDS = {"sdpa": sdpa_attention, "flash": flash_attention, "triton": triton_attention}
ROWS = {
    "dense": None,
    "packed": [0, 37, 38, 101, 101 + 64, 202, 202],
    "long": [0, 101, 202],
}
"""Borders of documents in two rows of 101 positions: odd lengths, a document of one token, one that fills a row."""


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Softmax by the formula, in the type of the tensors, over a mask of who may look at whom."""
    batch, heads, length, head_size = query.shape
    mask = packed_mask(borders, batch, length, window)
    key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) / head_size**0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_backends_against_float32_math(
    backend: str, rows: str, head_size: int, groups: int, window: int | None
) -> None:
    """Values and gradients in bf16."""
    check_against_math(backend, ROWS[rows], 101, head_size, groups, window)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    "borders",
    [None, [0, 1000, 1001, 1024, 1255, 1256, 2048], [0, 128, 256, 384, 1024, 2048]],
    ids=["dense", "odd", "even"],
)
def test_rows_of_many_blocks(backend: str, head_size: int, window: int | None, borders: list[int] | None) -> None:
    """Blocks that need no mask, that stand at a border, and whose keys reach back over several blocks."""
    check_against_math(backend, borders, 1024, head_size, 2, window)


class Layer(torch.nn.Module):
    """What transformers' own attention reads of the layer that calls it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def check_against_math(
    backend: str, rows: list[int] | None, length: int, head_size: int, groups: int, window: int | None
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    dense = [row * length for row in range(3)]
    borders = torch.tensor(rows or dense, dtype=torch.int32, device="cuda")
    shapes = [(2, 4, length, head_size), *[(2, 4 // groups, length, head_size)] * 2]
    rough = [torch.randn(s, generator=generator, device="cuda").bfloat16().requires_grad_() for s in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in rough]
    output, _ = BACKENDS[backend](
        Layer(groups), *rough, None, sliding_window=window, cu_seq_lens_q=borders if rows else None
    )
    expected = exact_attention(*exact, borders, window)
    assert output.shape == expected.shape
    assert (output.float() - expected).norm() < 6e-3 * expected.norm()
    weight = torch.randn(expected.shape, generator=generator, device="cuda")
    (output.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert (a.grad.float() - b.grad).norm() < 1.2e-2 * b.grad.norm()


def test_the_kernels_are_the_same_every_time_and_in_any_layout() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (torch.randn(2, 4, 300, 64, generator=generator, device="cuda").bfloat16() for _ in range(3))
    results = []
    for turned in (False, False, True):
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) if turned else t.clone() for t in (query, key, value)]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        output, _ = triton_attention(torch.nn.Identity(), *tensors, None)
        output.float().square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_float32_queries_under_autocast_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave float32 under autocast: packed rows fell back to a mask, at a third of the speed."""
    monkeypatch.setattr("truthgpt.attention.sdpa.shared_packed_mask", lambda *_: pytest.fail("made a mask"))
    tensors = [torch.randn(2, 4, 101, 64, device="cuda") for _ in range(3)]
    borders = torch.tensor(ROWS["packed"], dtype=torch.int32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = sdpa_attention(torch.nn.Identity(), *tensors, None, cu_seq_lens_q=borders)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_in_bf16_are_those_of_the_documents_alone(family: str) -> None:
    model = model_of(FAMILIES[family]).cuda().eval()
    batch, alone = packed_batch([[29, 1, 30], [7, 45, 8]])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        packed = causal_lm_loss(model, on_gpu(batch))[1]()
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
        logits = [causal_lm_loss(model, on_gpu(b))[1]() for b in (batch, other)]
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
