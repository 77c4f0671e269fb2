"""A micro-batch that is cut is what the collator makes of its samples in smaller micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.base import PackedSample
from truthgpt.data.collate import LMCollator, PackedCollator
from truthgpt.data.cut import cut_micro_batch

LENGTH = 32


def packed(lengths: list[int], seed: int) -> PackedSample:
    """A packed row of documents of these lengths, its end padding (which is a document of its own)."""
    generator = np.random.default_rng(seed)
    rest = LENGTH - sum(lengths)
    documents = [*lengths, *([rest] if rest else [])]
    return {
        "input_ids": generator.integers(0, 99, LENGTH),
        "labels": generator.integers(0, 99, LENGTH),
        "position_ids": np.concatenate([np.arange(n) for n in documents]),
        "document_lengths": np.array(documents),
    }


DOCUMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=2)


@given(st.lists(DOCUMENTS, min_size=1, max_size=6), st.integers(1, 7))
def test_packed_rows(rows: list[list[int]], size: int) -> None:
    samples = [packed(lengths, seed) for seed, lengths in enumerate(rows)]
    batch = PackedCollator(len(rows), LENGTH, pad_token_id=0)(samples)
    pieces = cut_micro_batch(batch, size)
    assert [len(piece["labels"]) for piece in pieces] == [len(rows[i : i + size]) for i in range(0, len(rows), size)]
    for first, piece in zip(range(0, len(rows), size), pieces, strict=True):
        part = samples[first : first + size]
        expected = PackedCollator(len(part), LENGTH, pad_token_id=0)(part)
        assert piece.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(piece[name], tensor), name


def test_padded_rows_and_images() -> None:
    samples = [{"input_ids": np.arange(n), "labels": np.arange(n)} for n in (3, 5, 4)]
    batch = LMCollator(pad_token_id=0)(samples)
    pieces = cut_micro_batch(batch, 2)
    assert [piece["labels"].shape for piece in pieces] == [(2, 5), (1, 5)]
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces]), batch["input_ids"])
    images = {"pixel_values": torch.zeros(3, 3, 8, 8), "labels": torch.arange(3)}
    assert [piece["pixel_values"].shape[0] for piece in cut_micro_batch(images, 1)] == [1, 1, 1]


@pytest.mark.parametrize("rows", [3, 9])
def test_what_is_small_enough_stays(rows: int) -> None:
    batch = {"input_ids": torch.zeros(3, 4), "labels": torch.zeros(3, 4)}
    assert cut_micro_batch(batch, rows)[0] is batch
