"""Packed documents: masks, logits and gradients as if each document stood alone, for every family of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attention.packed_models import COMMON, FAMILIES, LENGTH, WINDOW, model_of, packed_batch
from tests.plugins.reference_attention import reference_attention

from truthgpt.attention.install import install_attention, transformers_attention_in
from truthgpt.attention.masks import _kept_window_mask, _near, packed_mask
from truthgpt.attention.probe import LEAK_TOLERANCE, PackedErrors, dense_error, packed_errors, probe_length
from truthgpt.attention.sdpa import sdpa_attention
from truthgpt.models.causal_lm import causal_lm_loss


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 9)),
)
@settings(max_examples=60, deadline=None)
def test_the_mask_is_block_causal(lengths: list[int], rows: int, window: int | None) -> None:
    batch, _ = packed_batch([lengths] * rows)
    length = sum(lengths)
    mask = packed_mask(batch["cu_seq_lens"], rows, length, window)
    owner = [document for document, n in enumerate(lengths) for _ in range(n)]
    for query in range(length):
        for key in range(length):
            near = window is None or query - key < window
            expected = owner[query] == owner[key] and key <= query and near
            assert bool(mask[0, 0, query, key]) == expected
    assert mask.shape == (rows, 1, length, length)
    assert torch.equal(mask, mask[:1].expand_as(mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_the_documents_alone(family: str) -> None:
    model = model_of(FAMILIES[family]).eval()
    batch, alone = packed_batch([[29, 1, 30], [7, 45, 8]])  # longer than the window of 8, and a single token
    with torch.no_grad():
        _, packed = causal_lm_loss(model, batch)
        with transformers_attention_in(model):
            separate = [model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0] for ids in alone]
    assert torch.allclose(packed().flatten(0, 1), torch.cat(separate), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_documents_alone(family: str) -> None:
    packed, separate = (model_of(FAMILIES[family]).eval().double() for _ in range(2))
    batch, alone = packed_batch([[29, 1, 30]])
    loss, _ = causal_lm_loss(packed, batch)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for ids in alone:
        if len(ids) > 1:
            part, _ = causal_lm_loss(separate, {"input_ids": ids[None, :-1], "labels": ids[None, 1:]})
            part.backward()
            total += part.detach()
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-6)  # the loss itself is summed in float32
    for (name, one), two in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.allclose(one.grad, two.grad, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probes_accept_every_family(family: str) -> None:
    model = model_of(FAMILIES[family]).train()
    assert dense_error(model, LENGTH) == 0.0
    errors = packed_errors(model, LENGTH)
    assert errors.leak == 0.0 and errors.separate < 1e-6 and not errors.exceeded()
    assert model.training and model.config._attn_implementation == "truthgpt_sdpa"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
def test_the_probes_of_a_model_in_bf16_are_as_sharp(family: str) -> None:
    """A frozen model is held in bf16 from the start; in bf16 these errors would be 0.005."""
    model = model_of(FAMILIES[family])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    errors = packed_errors(model, LENGTH)
    assert errors.separate < 1e-6 and not errors.exceeded()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_sees_a_leak(family: str) -> None:
    """Attention that ignores the borders: position ids alone do not keep documents apart."""
    model = model_of(FAMILIES[family], install_attention("ignores_borders", reference_attention))
    errors = packed_errors(model, LENGTH)
    assert errors.exceeded() and errors.exceeded(half_precision=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_accepts_half_precision(family: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        errors = packed_errors(model_of(FAMILIES[family]), LENGTH)
    assert errors.separate > 0 and not errors.exceeded(half_precision=True)


def test_the_probe_sees_positions_that_do_not_restart() -> None:
    model = model_of(FAMILIES["gpt2"])
    forward = model.forward

    def without_positions(**keywords: Any) -> Any:
        keywords.pop("position_ids", None)
        return forward(**keywords)

    model.forward = without_positions  # type: ignore[method-assign]
    errors = packed_errors(model, LENGTH)
    assert errors.leak <= LEAK_TOLERANCE and errors.exceeded(), "no leak, and yet not what each document gives alone"


def test_the_probe_sees_one_mask_for_all_layers() -> None:
    """The error a leak probe alone does not see: windowed layers that look at the whole document."""

    def no_window(*tensors: Any, sliding_window: int | None = None, **keywords: Any) -> Any:
        return sdpa_attention(*tensors, **keywords)

    model = model_of(FAMILIES["gemma3"], install_attention("no_window", no_window))
    assert packed_errors(model, LENGTH).leak == 0.0
    assert dense_error(model, LENGTH) > 1e-3


def test_the_probe_sees_a_mask_that_only_the_model_knows() -> None:
    """Llama 4 attends in chunks: without transformers' masks its logits are others."""
    values = {"model_type": "llama4_text", **COMMON, "attention_chunk_size": 16, "num_local_experts": 2}
    model = model_of(values)
    assert dense_error(model, 12) < 1e-5
    assert dense_error(model, LENGTH) > 1e-2


@pytest.mark.parametrize(
    ("family", "changes", "seq_len", "expected"),
    [
        ("llama", {}, 60, 60),
        ("llama", {}, 100_000, 1024),
        ("mistral", {}, 100_000, 1024),
        ("mistral", {"sliding_window": 4096}, 100_000, 12_288),
        ("mistral", {"sliding_window": 4096}, 6_000, 6_000),
        ("mistral", {"sliding_window": None}, 100_000, 1024),
    ],
)
def test_probes_are_no_longer_than_they_need(family: str, changes: dict[str, Any], seq_len: int, expected: int) -> None:
    """Logits of a long row would take gigabytes before the first step."""
    assert probe_length(model_of({**FAMILIES[family], **changes}), seq_len) == expected


@pytest.mark.parametrize("seq_len", [2, 3])
def test_the_shortest_rows_can_be_probed(seq_len: int) -> None:
    assert not packed_errors(model_of(FAMILIES["llama"]), seq_len).exceeded()


def test_a_model_that_gives_nan_is_not_taken_for_right() -> None:
    assert PackedErrors(leak=float("nan"), separate=0.0).exceeded()
    assert PackedErrors(leak=0.0, separate=float("nan")).exceeded(half_precision=True)


def test_layers_of_a_kind_share_one_mask_that_goes_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []

    def counted(borders: torch.Tensor, batch: int, length: int, window: int | None) -> torch.Tensor:
        made.append(window)
        return packed_mask(borders, batch, length, window)

    monkeypatch.setattr("truthgpt.attention.masks.packed_mask", counted)
    model = model_of(FAMILIES["gemma3"]).eval()
    for seed in range(2):
        causal_lm_loss(model, packed_batch([[29, 31]], seed)[0])
    assert sorted(map(str, made)) == ["8", "8", "None", "None"], "two kinds of layers, two batches"


def test_the_window_of_dense_rows_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(length: int, window: int, device: torch.device) -> torch.Tensor:
        made.append(window)
        return _near(length, window, device)

    monkeypatch.setattr("truthgpt.attention.masks._near", counted)
    _kept_window_mask.cache_clear()
    model = model_of(FAMILIES["mistral"]).eval()
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    for _ in range(2):
        causal_lm_loss(model, {"input_ids": ids, "labels": ids})
    assert made == [WINDOW], "four layers, two batches"
    _kept_window_mask.cache_clear()


def test_scores_follow_the_formula_with_a_window() -> None:
    """Float64 reference of one head: softmax over the positions a token may see."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 12, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    borders = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    layer = torch.nn.Identity()
    output, _ = sdpa_attention(layer, query, key, value, None, sliding_window=3, cu_seq_lens_q=borders)
    for place in range(12):
        first = max(0 if place < 5 else 5, place - 2)
        scores = (key[0, 0, first : place + 1] @ query[0, 0, place]) / math.sqrt(4)
        expected = scores.softmax(0) @ value[0, 0, first : place + 1]
        assert torch.allclose(output[0, place, 0], expected)
