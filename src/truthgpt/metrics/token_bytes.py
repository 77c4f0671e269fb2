"""How many bytes of text each token of a tokenizer spells."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE_MARK = "\u2581"
"""How SentencePiece vocabularies write a space."""


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Bytes of UTF-8 text each token id spells.

    Exact for byte-level tokenizers (one character of the byte-level alphabet is one byte) and for SentencePiece ones,
    save the space that some of them put before the first word; any other tokenizer is asked to decode each id alone.

    Args:
        tokenizer: the tokenizer the labels were made with.
        vocab_size: number of ids to describe, V.

    Returns:
        int64 `(V,)` on the CPU; 0 for special tokens and for ids the tokenizer does not have.
    """
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    special = set(tokenizer.all_special_ids)
    added = {int(index): str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
    spelling = _spelling(tokenizer)
    for piece, index in tokenizer.get_vocab().items():
        if index >= vocab_size or index in special:
            continue
        if index in added:  # added tokens stand for themselves, outside any alphabet; Gemma's runs of marks are spaces
            text = added[index].replace(_SPACE_MARK, " ") if spelling == "sentencepiece" else added[index]
            lengths[index] = len(text.encode())
        elif spelling == "byte_level":
            lengths[index] = len(piece)
        elif spelling == "sentencepiece":
            text = piece.replace(_SPACE_MARK, " ")
            lengths[index] = 1 if _BYTE_FALLBACK.fullmatch(piece) else len(text.encode())
        else:
            lengths[index] = len(tokenizer.decode([index], clean_up_tokenization_spaces=False).encode())
    return lengths


def _spelling(tokenizer: PreTrainedTokenizerBase) -> str:
    """How the vocabulary writes text, read from the tokenizer's own decoder."""
    if not tokenizer.is_fast:
        return "unknown"
    steps = _decoder_steps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    if any(step["type"] == "ByteLevel" for step in steps):
        return "byte_level"
    if any(step["type"] == "Metaspace" for step in steps) or any(
        step["type"] == "Replace" and step["pattern"] == {"String": _SPACE_MARK} for step in steps
    ):
        return "sentencepiece"
    return "unknown"


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
