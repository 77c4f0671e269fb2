"""Tokenizers: the model's own, a saved one, one token a byte, or byte-level BPE trained on the run's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from truthgpt.errors import ConfigError, DataError, Problem
from truthgpt.runtime.hub import cache_when_unreachable

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (id = byte value) and an end-of-text token (id 256)."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    return _finish(_byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=[]))))


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) trained on `texts`.

    Args:
        texts: the training split, read once.
        vocab_size: at least 257: the 256 bytes and the end-of-text token come first.

    Raises:
        DataError: the texts are too little to learn `vocab_size` tokens from.
    """
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer=trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise DataError(
            f"the training text gives only {learned} of the {vocab_size} tokens that model.tokenizer.vocab_size asks "
            f"for; set it to at most {learned}, or use model.tokenizer.type: byte"
        )
    return _finish(tokenizer)


def load_tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """A saved tokenizer, from a folder or the hub.

    Raises:
        ConfigError: nothing there, no fast tokenizer, an empty one, or no end-of-text token.
    """
    try:
        with cache_when_unreachable(name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise _problem(f"no tokenizer can be read from {name_or_path!r}: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _problem(f"{name_or_path!r} has no fast tokenizer (a tokenizer.json)")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # What transformers makes of a GPT-2 folder without one: every text becomes no token at all.
        raise _problem(f"{name_or_path!r} has no tokenizer: its vocabulary is empty (a tokenizer.json is missing)")
    if tokenizer.eos_token_id is None:
        raise _problem(f"the tokenizer of {name_or_path!r} has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels come from spans, never from `id == pad`
    return tokenizer


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer a run saved into its model folder at the start, or None."""
    if not (folder / "tokenizer.json").is_file():
        return None
    return load_tokenizer(str(folder), trust_remote_code=False)


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers, by byte value (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_special_tokens({"eos_token": END_OF_TEXT})
    return wrapped


def _pieces(texts: Iterable[str], piece_chars: int = 1 << 20) -> Iterator[str]:
    """Cut huge texts, so that the trainer never holds a second copy of one whole."""
    for text in texts:
        for start in range(0, len(text), piece_chars):
            yield text[start : start + piece_chars]


def _problem(message: str) -> ConfigError:
    return ConfigError([Problem(key="model.tokenizer", message=message)])
