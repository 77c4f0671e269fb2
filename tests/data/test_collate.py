from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.data.base import Sample
from truthgpt.data.collate import LMCollator, PackedCollator
from truthgpt.data.packing import join_samples, max_packed_documents


def sample(*tokens: int) -> Sample:
    values = np.array(tokens, dtype=np.int64)
    return {"input_ids": values[:-1], "labels": values[1:]}


@pytest.mark.parametrize(("multiple", "length"), [(1, 3), (2, 4), (8, 8)])
def test_pads_on_the_right(multiple: int, length: int) -> None:
    batch = LMCollator(9, multiple)([sample(1, 2, 3, 4), sample(5, 6)])
    assert batch["input_ids"].tolist() == [[1, 2, 3] + [9] * (length - 3), [5] + [9] * (length - 1)]
    assert batch["labels"].tolist() == [[2, 3, 4] + [-100] * (length - 3), [6] + [-100] * (length - 1)]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "labels"}


def test_a_real_pad_token_stays_a_label() -> None:
    assert LMCollator(9)([sample(1, 9), sample(1, 2, 9)])["labels"].tolist() == [[9, -100], [2, 9]]


@pytest.mark.parametrize(("tokens", "length"), [(1, 4), (4, 4), (5, 7), (7, 7), (8, 8)])
def test_bins(tokens: int, length: int) -> None:
    batch = LMCollator(0, bins=[7, 4])([sample(*range(tokens + 1)), sample(1, 2)])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, length)


def test_bins_with_multiple_and_limit() -> None:
    collate = LMCollator(0, pad_to_multiple_of=8, max_seq_len=20, bins=[7, 20])
    assert [collate([sample(*range(tokens + 1))])["labels"].shape[1] for tokens in (3, 8, 19)] == [8, 20, 20]


def test_packed_rows() -> None:
    rows = [join_samples([sample(1, 2, 3), sample(4, 5)], 8, 9), join_samples([sample(*range(10, 19))], 8, 9)]
    batch = PackedCollator(3, 8, 9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 4, 9, 9, 9, 9, 9], list(range(10, 18)), [9] * 8]
    assert batch["labels"].tolist() == [[2, 3, 5] + [-100] * 5, list(range(11, 19)), [-100] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 4], list(range(8)), list(range(8))]
    assert batch["cu_seq_lens"].tolist() == [0, 2, 3, 8, 16, 24, 24, 24, 24, 24]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), max_size=4), st.integers(30, 40))
def test_packed_shapes_never_change(rows: list[list[int]], max_seq_len: int) -> None:
    kept = [[length for length, end in zip(row, np.cumsum(row), strict=True) if end <= max_seq_len] for row in rows]
    samples = [join_samples([sample(*range(length + 1)) for length in row], max_seq_len, 0) for row in kept]
    batch = PackedCollator(4, max_seq_len, 0)(samples)
    borders = batch["cu_seq_lens"].tolist()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (4, max_seq_len)
    assert len(borders) == 4 * max_packed_documents(max_seq_len) + 1
    assert borders == sorted(borders)
    assert set(range(0, 4 * max_seq_len + 1, max_seq_len)) <= set(borders)  # no document crosses a row
    starts = torch.tensor(sorted(set(borders[:-1]) - {4 * max_seq_len}))
    assert torch.equal(torch.nonzero(batch["position_ids"].flatten() == 0).flatten(), starts)
    assert int((batch["labels"] != -100).sum()) == sum(map(sum, kept))


def test_too_many_packed_rows() -> None:
    row = join_samples([sample(1, 2)], 4, 0)
    with pytest.raises(ValueError, match="2 packed rows do not fit into a micro-batch of 1"):
        PackedCollator(1, 4, 0)([row, row])
    with pytest.raises(ValueError):
        PackedCollator(1, 5, 0)([row])
