"""Which tokens end a text."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of a generation config that came with the model's weights.

    One derived from the model's configuration says nothing: its ids are defaults of the architecture (2 for Llama),
    which mean some ordinary token in another vocabulary.
    """
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    own = model.generation_config
    if own is not None and own.eos_token_id is not None and not getattr(own, "_from_model_config", False):
        ids |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    return sorted(ids)
