"""Tokens that the tokenizer has and the model has not: new rows of its embeddings and its output head.

They begin as the mean of the rows there are (Hewitt 2021), which changes what the model says least. A model that is
trained whole is resized. Below adapters the tables stay as they are, and the new rows are trained beside them; they are
saved as peft saves `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from truthgpt.errors import ConfigError, Problem
from truthgpt.runtime.seeds import random_state_kept


class AddedTokens(nn.Module):
    """An embedding or a head without bias, frozen, with trained rows below its own. The names of its parts are peft's.

    The whole table is put together in every call, and has a gradient as a whole, as in peft.
    """

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_adapter = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes with the whole table."""
        result: torch.Tensor = functional_call(self.base_layer, {"weight": self.weight}, (x,))
        return result

    @property
    def weight(self) -> torch.Tensor:
        """The whole table, `(tokens, D)`, in the type of its frozen part."""
        known: Any = self.base_layer.weight
        return torch.cat([known, self.token_adapter.trainable_tokens_delta.to(known.dtype)])

    @property
    def bias(self) -> None:
        """There is none; peft's format has no place for one."""
        return


class TokenRows(nn.Module):
    """The new rows, `(tokens, D)`, float32; tied tables have one."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows)


def missing_tokens(model: PreTrainedModel, tokens: int) -> int:
    """How many of a tokenizer's `tokens` have no row in the embeddings of `model`."""
    known: int = _tables(model)[0][1].weight.shape[0]
    return max(0, tokens - known)


def resize_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Give `model` an embedding for each of `tokens`, and a row of its head; tied ones stay tied."""
    before = _tables(model)[0][1].weight.shape[0]
    with random_state_kept():
        model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for _, table in _tables(model):
            for values in (table.weight, getattr(table, "bias", None)):
                if values is not None:
                    values[before:] = values[:before].mean(0)


def add_token_rows(model: PreTrainedModel, added: int) -> dict[str, list[int]]:
    """Put `added` trained rows below the embeddings of `model` and below its head, in place.

    Returns:
        The rows' token ids by the name of their table, as peft writes them; of tied tables the embedding alone.

    Raises:
        ConfigError: the head has a bias.
    """
    tables = _tables(model)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        message = f"has {added} tokens more than the model, whose output head has a bias: peft saves no rows of that"
        hint = "train all weights (model.lora.enabled: false), or use the model's own tokenizer"
        raise ConfigError([Problem(key="model.tokenizer", message=message, suggestion=hint)])
    indices: dict[str, list[int]] = {}
    tied = head is not None and head.weight is tables[0][1].weight
    for name, table in tables:
        known = table.weight.detach()
        if not (tied and indices):
            rows = TokenRows(known.mean(0, dtype=torch.float32).repeat(added, 1))
            indices[name] = list(range(known.shape[0], known.shape[0] + added))
        model.set_submodule(name, AddedTokens(table, rows))
    return indices


def add_saved_rows(model: PreTrainedModel, saved: Mapping[str, Sequence[int]] | Sequence[int] | None) -> None:
    """Put rows on `model` for the `trainable_token_indices` of saved adapters; their values are not loaded yet.

    Raises:
        ValueError: they are other rows than those of new tokens in every table.
    """
    if not saved:
        return
    ids = next(iter(saved.values())) if isinstance(saved, Mapping) else saved
    expected = add_token_rows(model, len(ids))
    found = saved if isinstance(saved, Mapping) else {next(iter(expected)): ids}
    same = len(found) == len(expected) and all(
        any(f".{name}".endswith(f".{key}") and list(found[key]) == rows for key in found)
        for name, rows in expected.items()
    )
    if not same:
        raise ValueError("they train tokens that the base model has (trainable_token_indices)")


def _tables(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Embeddings and head, by their names."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [(name, module) for part in wanted for name, module in model.named_modules() if module is part]
