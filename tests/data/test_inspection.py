"""Lengths, filling and masks, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.base import IGNORED_LABEL, Sample
from truthgpt.data.batch_order import BucketedOrder, ShuffledOrder
from truthgpt.data.inspection import filling, marked_tokens, packed_documents, summarize_lengths
from truthgpt.data.packing import join_samples


@given(st.lists(st.integers(1, 400), min_size=1, max_size=50))
def test_the_histogram_holds_every_sample_once(lengths: list[int]) -> None:
    summary = summarize_lengths(np.array(lengths))
    assert sum(count for _, _, count in summary.histogram) == len(lengths)
    for low, high, count in summary.histogram:
        assert count == sum(low <= length <= high for length in lengths)
    assert summary.histogram[0][0] == min(lengths) and summary.histogram[-1][1] == max(lengths)
    assert len(summary.histogram) <= 12


def test_percentiles_are_lengths_that_occur() -> None:
    summary = summarize_lengths(np.array([*range(1, 101)]))
    assert (summary.shortest, summary.median, summary.p95, summary.p99, summary.longest) == (1, 51, 96, 100, 100)
    assert summary.mean == 50.5


def test_padding_is_to_the_longest_of_the_micro_batch() -> None:
    lengths = np.array([1, 2, 3, 10])
    order = ShuffledOrder(4, micro_batch_size=4, grad_accum_steps=1, seed=0)
    assert filling(lengths, order).useful_token_share == 16 / 40
    alone = ShuffledOrder(4, micro_batch_size=1, grad_accum_steps=1, seed=0)
    assert filling(lengths, alone).useful_token_share == 1.0
    assert filling(lengths, alone).steps_per_epoch == 4


def test_bucketing_pads_to_the_bin() -> None:
    lengths = np.array([1, 2, 3, 10])
    order = BucketedOrder(lengths, [4, 12], micro_batch_size=8, grad_accum_steps=1, seed=0)
    assert filling(lengths, order, [4, 12]).useful_token_share == pytest.approx(16 / (3 * 4 + 12))


def sample(ids: list[int], labels: list[int]) -> Sample:
    return {"input_ids": np.array(ids), "labels": np.array(labels)}


def test_tokens_are_marked_by_the_label_that_asks_for_them() -> None:
    masked = IGNORED_LABEL
    found = marked_tokens(sample([5, 6, 7], [masked, 7, 8]))
    assert found == [(5, False), (6, False), (7, True), (8, True)]
    cut = marked_tokens(sample([5, 6], [6, masked]))
    assert cut == [(5, False), (6, True)], "what a masked last label asked for is not known"


def test_documents_of_a_packed_sample() -> None:
    parts = [sample([1, 2], [2, 3]), sample([4], [5])]
    found = packed_documents(join_samples(parts, max_seq_len=6, pad_token_id=0))
    assert [piece["input_ids"].tolist() for piece in found] == [[1, 2], [4]]
    assert [piece["labels"].tolist() for piece in found] == [[2, 3], [5]]
    assert packed_documents(parts[0]) == [parts[0]]
