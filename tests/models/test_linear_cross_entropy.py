"""The chunked loss against float64, for every way of cutting and masking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.loss_reference import reference_gradients

from truthgpt.models import linear_cross_entropy as module
from truthgpt.models.linear_cross_entropy import OutputHead, linear_cross_entropy

TOKENS, WIDTH, VOCAB = 13, 8, 37


def problem(bias: bool = False, scale: float = 1.0, softcap: float | None = None, seed: int = 0, spread: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (spread * torch.randn(TOKENS, WIDTH, generator=generator)).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    offset = torch.randn(VOCAB, generator=generator).requires_grad_() if bias else None
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, OutputHead(weight, offset, scale, softcap), labels


def check(hidden: torch.Tensor, head: OutputHead, labels: torch.Tensor, chunk_tokens: int | None, factor: float = 0.37):
    loss = linear_cross_entropy(hidden, head, labels, chunk_tokens)
    expected, gradients = reference_gradients(hidden, head, labels, factor)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=1e-5)
    leaves = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    (loss * factor).backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-5)


MASKS = {
    "none": slice(0, 0),
    "first": slice(0, 1),
    "last": slice(-1, None),
    "a whole chunk": slice(4, 8),
    "all but one": slice(1, None),
    "all": slice(None),
}


@pytest.mark.parametrize("chunk_tokens", [*range(1, TOKENS + 2), None])
@pytest.mark.parametrize("masked", MASKS)
def test_loss_and_gradients_are_exact_for_every_chunk_size_and_mask(chunk_tokens: int | None, masked: str) -> None:
    hidden, head, labels = problem()
    labels[MASKS[masked]] = -100
    check(hidden, head, labels, chunk_tokens)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0625, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
def test_a_head_may_have_a_bias_a_scale_and_a_soft_cap(bias: bool, scale: float, softcap: float | None) -> None:
    check(*problem(bias, scale, softcap), chunk_tokens=5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, TOKENS), data=st.data())
def test_any_mask(seed: int, chunk: int, data: st.DataObject) -> None:
    hidden, head, labels = problem(seed=seed, spread=3.0)
    labels[torch.tensor(data.draw(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)))] = -100
    check(hidden, head, labels, chunk)


def test_logits_of_any_size_do_not_overflow() -> None:
    hidden, head, labels = problem(spread=300.0)
    loss = linear_cross_entropy(hidden, head, labels, 4)
    loss.backward()
    assert math.isfinite(loss.item()) and bool(torch.isfinite(head.weight.grad).all())


def test_a_frozen_head_gets_no_gradient_and_costs_no_buffer_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = problem()
    head.weight.requires_grad_(False)
    monkeypatch.setattr(module, "_sum_product", lambda *_: pytest.fail("computed the gradient of a frozen head"))
    linear_cross_entropy(hidden, head, labels, 4).backward()
    assert head.weight.grad is None
    _, gradients = reference_gradients(hidden, head, labels)
    torch.testing.assert_close(hidden.grad.double(), gradients[0], rtol=1e-5, atol=1e-6)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = problem()
    with_gradient = linear_cross_entropy(hidden, head, labels, 4).detach()
    monkeypatch.setattr(module._Gradients, "add", lambda *_: pytest.fail("computed a gradient"))
    with torch.no_grad():
        assert linear_cross_entropy(hidden, head, labels, 4) == with_gradient


def test_under_autocast_the_products_are_in_its_type_and_the_sums_in_float32() -> None:
    hidden, head, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, labels, 4)
    assert loss.dtype == torch.float32
    loss.backward()
    expected, gradients = reference_gradients(hidden, head, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-7)  # it really was bf16
    for leaf, gradient in ((hidden, gradients[0]), (head.weight, gradients[1])):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad.double() - gradient).norm() < 0.01 * gradient.norm()


def test_the_factor_of_the_backward_pass_is_not_rounded_to_the_hidden_states_type() -> None:
    # 0.37 in bf16 is 0.3691: every gradient of the body would be 0.2% too small.
    hidden, head, labels = problem()
    half = hidden.detach().bfloat16().requires_grad_()
    once, scaled = (
        torch.autograd.grad(factor * linear_cross_entropy(half, OutputHead(head.weight.bfloat16()), labels, 4), half)[0]
        for factor in (1.0, 0.37)
    )
    ratio = scaled.float().norm() / once.float().norm()
    assert ratio.item() == pytest.approx(0.37, rel=5e-4)


def test_logits_are_made_in_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels = problem()
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 3 * VOCAB * 4)
    sizes: list[int] = []
    real = module._losses

    def watched(logits: torch.Tensor, *others: object) -> object:
        sizes.append(logits.shape[0])
        return real(logits, *others)

    monkeypatch.setattr(module, "_losses", watched)
    linear_cross_entropy(hidden, head, labels)
    assert sum(sizes) == TOKENS and max(sizes) <= 3
