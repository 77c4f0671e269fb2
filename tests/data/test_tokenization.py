from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data import tokenization
from truthgpt.data.base import Document, Segment
from truthgpt.data.tokenization import SpecialFrame, special_frame, tokenize
from truthgpt.errors import DataError

from .conftest import byte_tokenizer, rows

MERGES = ("he", "ll", "Ġw")


def test_frame_of_a_tokenizer_without_habits() -> None:
    assert special_frame(byte_tokenizer()) == SpecialFrame((), 256)


@pytest.mark.parametrize("close", [False, True])
def test_frame_takes_the_begin_token_and_leaves_the_closing_one(close: bool) -> None:
    assert special_frame(byte_tokenizer(begin=True, close=close)) == SpecialFrame((257,), 256)


def test_frame_needs_an_end_of_text_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        special_frame(tokenizer)


@given(st.text(max_size=60))
def test_frame_and_ids_are_what_generation_sees(text: str) -> None:
    tokenizer = byte_tokenizer(begin=True, merges=MERGES)
    frame = special_frame(tokenizer)
    (run,) = tokenize(rows(text), tokenizer, 300)
    assert [*frame.prefix, *run.ids.tolist()] == tokenizer(text).input_ids


def test_padding_and_truncation_left_on_change_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["long enough", "b"], padding="max_length", truncation=True, max_length=4)
    frame = special_frame(tokenizer)
    runs = list(tokenize(rows("long enough", "b"), tokenizer, 300))
    assert (frame.prefix, [run.ids.size for run in runs]) == ((), [11, 1])


def test_runs_keep_documents_segments_and_pieces_apart() -> None:
    documents = [
        Document("a", (Segment("ab", trained=False), Segment("c")), "here"),
        Document("b", (Segment("d"),), "here", continues=True),
        Document("c", (Segment(""), Segment("e")), "here"),
    ]
    runs = list(tokenize(documents, byte_tokenizer(), 258))
    assert [(run.ids.size, run.trained, run.opens, run.document) for run in runs] == [
        (2, False, True, 1),
        (1, True, False, 1),
        (1, True, False, 2),
        (0, True, True, 3),
        (1, True, False, 3),
    ]


@pytest.mark.parametrize("text", ["word word\n" * 100, "x" * 1000, "\n" * 300, "short", "é\n" * 200 + "tail"])
def test_cutting_a_huge_text_loses_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 200)
    runs = list(tokenize(rows(text), byte_tokenizer(), 258))
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([token for run in runs for token in run.ids.tolist()]) == text
    assert [run.opens for run in runs] == [True] + [False] * (len(runs) - 1)
    assert len(runs) >= len(text) // 64
    assert all(run.ids.size <= 64 * 2 for run in runs)


def test_token_the_model_does_not_have_names_document_id_and_limit() -> None:
    tokenizer = byte_tokenizer(merges=("he",))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* token id 256 \('he'\), the model has ids 0 to 255;.*259"):
        list(tokenize(rows("fine", "he"), tokenizer, 256))
