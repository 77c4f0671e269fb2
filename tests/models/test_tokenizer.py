"""Tokenizers: bytes are bytes, BPE is the same every time, a saved one comes back, and an unusable one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from truthgpt.errors import ConfigError, DataError
from truthgpt.models.tokenizer import (
    END_OF_TEXT,
    byte_tokenizer,
    load_tokenizer,
    saved_tokenizer,
    train_bpe_tokenizer,
)

BYTES = byte_tokenizer()
TEXTS = ["the cat saw the dog and the queen saw the cat\n" * 5, "über naïve 猫は走った 🐈‍⬛ ran\n" * 5]
BPE = train_bpe_tokenizer(TEXTS, 290)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: END_OF_TEXT not in text)


@given(UNICODE)
def test_byte_ids_are_the_bytes(text: str) -> None:
    assert BYTES(text).input_ids == list(text.encode())
    assert BYTES.decode(BYTES(text).input_ids, skip_special_tokens=True) == text


@given(UNICODE)
def test_bpe_round_trip(text: str) -> None:
    assert BPE.decode(BPE(text).input_ids, skip_special_tokens=True) == text


def test_sizes_and_special_tokens() -> None:
    for tokenizer, size in ((BYTES, 257), (BPE, 290)):
        assert len(tokenizer) == size
        assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
        assert tokenizer(END_OF_TEXT).input_ids == [tokenizer.eos_token_id]
    assert BYTES.eos_token_id == 256


def test_bpe_is_deterministic_and_learns() -> None:
    again = train_bpe_tokenizer(iter(TEXTS), 290)
    assert again.get_vocab() == BPE.get_vocab()
    assert len(BPE(TEXTS[0]).input_ids) < len(TEXTS[0]) / 2
    assert BPE.get_vocab() != train_bpe_tokenizer(TEXTS[1:], 280).get_vocab()


def test_bpe_of_too_little_text_says_how_much_it_gives() -> None:
    with pytest.raises(DataError, match=r"only \d+ of the 5000 tokens"):
        train_bpe_tokenizer(["a b c"], 5000)


def test_huge_document_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text of 3 million characters trains like the same words in many texts."""
    words = "cat dog queen "
    assert (
        train_bpe_tokenizer([words * 220_000], 262).get_vocab() == train_bpe_tokenizer([words] * 1000, 262).get_vocab()
    )


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
def test_saved_tokenizer_comes_back(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert saved_tokenizer(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    again = saved_tokenizer(tmp_path)
    assert again is not None and len(again) == len(tokenizer)
    text = "the cat 猫 <|endoftext|>  x\n"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


def test_pad_falls_back_to_end_of_text(tmp_path: Path) -> None:
    saved = byte_tokenizer()
    saved.pad_token = None
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), trust_remote_code=False)
    assert loaded.pad_token_id == loaded.eos_token_id == 256


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be read from"):
        load_tokenizer(str(tmp_path / "nowhere"), trust_remote_code=False)
    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path / "no_end")
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "no_end"), trust_remote_code=False)
    shutil.rmtree(tmp_path / "no_end")
