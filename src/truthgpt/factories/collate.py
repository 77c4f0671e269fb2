"""COLLATORS: how samples become a micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from truthgpt.factories.registry import Options, Registry

if TYPE_CHECKING:
    from truthgpt.data.base import Collator

COLLATORS = Registry("collator", runtime=("pad_token_id", "max_seq_len"))


class LMOptions(Options):
    """Options of the collator `lm`."""

    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Round the length of a batch up to a multiple of this many tokens."""


@COLLATORS.register("lm", options=LMOptions)
def build_lm_collator(pad_token_id: int, pad_to_multiple_of: int, max_seq_len: int) -> Collator:
    """Pads token sequences on the right to the longest of the micro-batch."""
    from truthgpt.data.collate import LMCollator

    return LMCollator(pad_token_id, pad_to_multiple_of, max_seq_len)
