"""The chunked loss on a GPU: the kernel and the padded head against float64, and no whole logits in memory."""

from __future__ import annotations

import pytest
import torch
from tests.models.loss_reference import reference_gradients

from truthgpt.models.linear_cross_entropy import OutputHead, linear_cross_entropy

pytestmark = pytest.mark.gpu

RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Norm of the error over the norm of the gradient, by the type of the products."""


def problem(tokens: int, width: int, vocab: int, dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator, device="cuda") * width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator, device="cuda")
    labels[::7] = -100
    return hidden, weight, labels


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"


# GPT-2's vocabulary is no multiple of 8; 17 tokens are fewer than a block; 8192 and 16384 are whole blocks.
@pytest.mark.parametrize("vocab", [17, 8191, 8192, 16384, 50257])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("chunk_tokens", [64, 100, None])
def test_loss_and_gradients_against_float64(vocab: int, dtype: torch.dtype, chunk_tokens: int | None) -> None:
    hidden, weight, labels = problem(210, 64, vocab, dtype)
    head = OutputHead(weight)
    expected, gradients = reference_gradients(hidden, head, labels, 0.37)
    loss = linear_cross_entropy(hidden, head, labels, chunk_tokens)
    (0.37 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=max(RELATIVE[dtype] / 10, 1e-6))
    for leaf, gradient in ((hidden, gradients[0]), (weight, gradients[1])):
        assert (leaf.grad.double() - gradient).norm() < RELATIVE[dtype] * gradient.norm()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_bias_scale_and_soft_cap(softcap: float | None, bias: bool) -> None:
    hidden, weight, labels = problem(100, 64, 1000, torch.float32)
    offset = torch.randn(1000, device="cuda", requires_grad=True) if bias else None
    head = OutputHead(weight, offset, 0.5, softcap)
    expected, gradients = reference_gradients(hidden, head, labels)
    loss = linear_cross_entropy(hidden, head, labels, 32)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for leaf, gradient in zip([hidden, weight, *([offset] if bias else [])], gradients, strict=True):
        assert (leaf.grad.double() - gradient).norm() < 1e-5 * gradient.norm()


def test_under_autocast_the_gradient_of_a_float32_head_is_summed_in_float32() -> None:
    hidden, weight, labels = problem(4096, 64, 512, torch.float32)
    head = OutputHead(weight)
    _, gradients = reference_gradients(hidden, head, labels)
    with torch.autocast("cuda", torch.bfloat16):
        linear_cross_entropy(hidden, head, labels, 16).backward()
    # 256 sums of chunks in bf16 would lose far more than the products themselves.
    assert (weight.grad.double() - gradients[1]).norm() < RELATIVE[torch.bfloat16] * gradients[1].norm()


def test_no_whole_logits_in_memory() -> None:
    hidden, weight, labels = problem(65536, 64, 50257, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, OutputHead(weight), labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 65536 * 50257 * 2 / 4


def test_nothing_waits_for_the_device() -> None:
    hidden, weight, labels = problem(300, 64, 1000, torch.bfloat16)
    linear_cross_entropy(hidden, OutputHead(weight), labels, 128).backward()  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, OutputHead(weight), labels, 128).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
