"""A Llama with random weights and a tokenizer that gives every token a text, as a Hugging Face folder.

    python benchmarks/gpu/random_llama.py FOLDER --size 1b

The token that ends a text is never the likeliest, so that a greedy answer has the tokens that were asked for. A
printable ASCII character is a token; the others are made-up words, which only the model writes.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 128_256
PRINTABLE = "".join(chr(code) for code in range(32, 127))
END = "<|end|>"
SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        **{"vocab_size": VOCABULARY, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072},
    },
    "small": {
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048},
    },
}
"""The shape of Llama 1B, and one that a CPU runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    options = parser.parse_args(argv)

    model = random_llama(options.size)
    tokenizer = word_tokenizer(model.config.vocab_size)
    # The logit of a row of zeros is 0, and among the others of a random model there are always larger ones.
    model.get_input_embeddings().weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


def random_llama(size: str) -> Any:
    """The model in bf16, for evaluation, on the GPU if there is one; the same weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ends: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None}
    config = AutoConfig.for_model("llama", **SIZES[size], **ends, rope_theta=500_000.0, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every answer is written to its end
    return model


def word_tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer of the printable characters, the end of a text, and words up to `vocabulary` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # a space, in the alphabet of byte-level tokenizers
    tokens = [space if character == " " else character for character in PRINTABLE]
    tokens += [END, *(space + _word(number) for number in range(vocabulary - len(tokens) - 1))]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _word(number: int) -> str:
    """A word of four letters, another one for every number below 26 ** 4."""
    letters = string.ascii_lowercase
    return "".join(letters[number // 26**place % 26] for place in range(4))


if __name__ == "__main__":
    main()
