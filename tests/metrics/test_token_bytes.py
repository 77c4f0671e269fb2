"""Bytes each token spells, for the kinds of tokenizers there are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from truthgpt.metrics.token_bytes import token_byte_lengths

TEXT = "Äpfel und Öl: 12 €, naïve café, 日本語 😀\n\tdef f(x): return x\n"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("é", -4.0), *((c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz.")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_byte_level_lengths_add_up_to_the_text(text: str) -> None:
    tokenizer = BYTE_LEVEL
    lengths = token_byte_lengths(tokenizer, len(tokenizer))
    ids = tokenizer(text.encode("utf-8", "replace").decode("utf-8"))["input_ids"]
    assert int(lengths[ids].sum()) == len(text.encode("utf-8", "replace"))


BYTE_LEVEL = byte_level()


@pytest.mark.parametrize("decoder", [LLAMA_DECODER, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])])
def test_sentencepiece_counts_spaces_and_fallback_bytes(decoder: decoders.Decoder) -> None:
    tokenizer = sentencepiece(decoder)
    lengths = token_byte_lengths(tokenizer, len(tokenizer))
    text = "over the é hill 😀."
    ids = tokenizer(text)["input_ids"]
    assert any(tokenizer.convert_ids_to_tokens(index).startswith("<0x") for index in ids)
    assert int(lengths[ids].sum()) == len(text.encode())


def test_runs_of_spaces_among_the_added_tokens() -> None:
    """As in Gemma: they never match a text, which has spaces, and the model of the tokenizer has the same ones."""
    pieces = ["<unk>", "</s>", "▁", "▁▁", "▁▁▁▁", "a", "b"]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in ("▁▁", "▁▁▁▁")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    text = "a    b  a"
    ids = wrapped(text)["input_ids"]
    assert ids == [5, 4, 6, 3, 5] and wrapped.decode(ids) == text
    assert int(token_byte_lengths(wrapped, len(pieces))[ids].sum()) == len(text.encode())


def test_special_and_added_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool é>"])
    lengths = token_byte_lengths(tokenizer, len(tokenizer))
    assert lengths[tokenizer.eos_token_id] == 0
    assert lengths[tokenizer.convert_tokens_to_ids("<tool é>")] == len("<tool é>".encode())


def test_a_larger_or_smaller_vocabulary() -> None:
    whole = token_byte_lengths(BYTE_LEVEL, len(BYTE_LEVEL) + 60)
    assert whole.shape == (len(BYTE_LEVEL) + 60,)
    assert whole[len(BYTE_LEVEL) :].sum() == 0
    assert token_byte_lengths(BYTE_LEVEL, 10).tolist() == whole[:10].tolist()


def test_other_tokenizers_are_asked_to_decode() -> None:
    vocabulary = {"<unk>": 0, "word": 1, "naïve": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_byte_lengths(wrapped, 3).tolist() == [0, 4, 6]
