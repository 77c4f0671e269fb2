"""Tokenizers and documents small enough to check by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from truthgpt.data.base import Document, Segment
from truthgpt.data.split import DocumentSet, split_documents
from truthgpt.data.token_store import TokenStore, tokenize_documents
from truthgpt.data.tokenization import DocumentEncoder

END = "<|endoftext|>"
BEGIN = "<|begin|>"

MakeStore = Callable[..., TokenStore]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer(
    *, begin: bool = False, close: bool = False, merges: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, then `merges` (pairs joined), then the end and begin tokens; `begin` and `close` add them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    for merge in merges:
        vocab[merge] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(merge[:-1], merge[-1]) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, BEGIN])
    if begin or close:
        template = f"{BEGIN + ' ' if begin else ''}$A{' ' + END if close else ''}"
        names = [(token, backend.token_to_id(token)) for token in (END, BEGIN)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=BEGIN if begin else None)


def byte_encoder(
    vocab_size: int = 258, *, begin: bool = False, close: bool = False, merges: tuple[str, ...] = ()
) -> DocumentEncoder:
    """An encoder over `byte_tokenizer`."""
    return DocumentEncoder(byte_tokenizer(begin=begin, close=close, merges=merges), vocab_size)


class ListSource:
    """Documents from memory."""

    def __init__(self, documents: list[Document], layout: Literal["stream", "rows"] = "rows") -> None:
        self.layout: Literal["stream", "rows"] = layout
        self.items = documents

    def documents(self) -> Iterator[Document]:
        yield from self.items


def rows(*texts: str | tuple[str, str]) -> list[Document]:
    """A document a text; a pair is an untrained prompt and its completion."""
    return [
        Document(
            f"row {index} {text}",
            (Segment(text),) if isinstance(text, str) else (Segment(text[0], trained=False), Segment(text[1])),
            where=f"rows.jsonl:{index + 1}",
        )
        for index, text in enumerate(texts)
    ]


def all_of(documents: list[Document]) -> DocumentSet:
    """Every document, nothing held out."""
    return split_documents(ListSource(documents), validation_fraction=0).train


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Tokenised documents in a cache of the test's own; one token a byte, 258 ids."""

    def make(documents: list[Document]) -> TokenStore:
        return tokenize_documents(all_of(documents), byte_encoder(), tmp_path / "cache")

    return make
