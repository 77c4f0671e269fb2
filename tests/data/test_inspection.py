"""Lengths, filling and masks, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from truthgpt.data.base import IGNORED_LABEL, Sample
from truthgpt.data.batch_order import BucketedOrder, ShuffledOrder
from truthgpt.data.inspection import filling, marked_tokens, packed_documents, summarize_lengths, token_texts
from truthgpt.data.packing import join_samples

from .conftest import byte_tokenizer


@given(st.lists(st.integers(1, 400), min_size=1, max_size=50))
def test_the_histogram_holds_every_sample_once(lengths: list[int]) -> None:
    summary = summarize_lengths(np.array(lengths))
    assert sum(count for _, _, count in summary.histogram) == len(lengths)
    for low, high, count in summary.histogram:
        assert count == sum(low <= length <= high for length in lengths)
    assert summary.histogram[0][0] == min(lengths) and summary.histogram[-1][1] == max(lengths)
    assert len(summary.histogram) <= 12


def llama_like() -> PreTrainedTokenizerFast:
    """Two words, spaces, and bytes for all else; it drops the first space of what it decodes."""
    words = ["</s>", "▁", "▁one", "two", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@given(st.lists(st.sampled_from([" one", "two", " ", "é", "日", "😀", "</s>"]), min_size=1, max_size=20))
def test_texts_of_tokens_are_together_the_text(pieces: list[str]) -> None:
    llama, known = llama_like(), {" one": "▁one", " ": "▁", "two": "two", "</s>": "</s>"}
    spelt = [[known[piece]] if piece in known else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    ids = [llama.convert_tokens_to_ids(token) for tokens in spelt for token in tokens]
    assert token_texts(ids, llama.decode) == list(expected_texts(pieces, spelt))
    plain = byte_tokenizer()
    text = "".join(pieces)
    whole = plain(text).input_ids
    texts = token_texts(whole, plain.decode)
    assert len(texts) == len(whole) and "".join(texts) == text


def expected_texts(pieces: list[str], spelt: list[list[str]]) -> Iterator[str]:
    """The text of a piece stands at its last token; the first space of all is dropped."""
    for number, (piece, tokens) in enumerate(zip(pieces, spelt, strict=True)):
        yield from [""] * (len(tokens) - 1)
        yield piece.removeprefix(" ") if number == 0 else piece


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
