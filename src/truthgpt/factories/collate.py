"""COLLATORS: how samples become a micro-batch.

A collator of text takes `pad_token_id`; one that takes `packed_rows` can be given packed samples, one that takes `bins`
bucketed ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from truthgpt.factories.registry import Options, Registry

if TYPE_CHECKING:
    from truthgpt.data.base import Collator

COLLATORS = Registry("collator", runtime=("pad_token_id", "max_seq_len", "packed_rows", "bins"))


class LMOptions(Options):
    """Options of the collator `lm`."""

    pad_to_multiple_of: int = Field(default=1, ge=1)
    """Round the length of a batch up to a multiple of this many tokens."""


class CVOptions(Options):
    """Options of the collator `cv`: random changes of the training images, drawn anew every epoch."""

    random_resized_crop: bool = False
    """Cut out a random part of 8% to 100% of the area and scale it to the model's size."""
    horizontal_flip: bool = False
    """Mirror every second image."""
    image_size: int | None = Field(default=None, ge=8)
    """Height and width, for models whose configuration names none; null: the model's own, else 224."""


@COLLATORS.register("lm", options=LMOptions)
def build_lm_collator(
    pad_token_id: int,
    pad_to_multiple_of: int,
    max_seq_len: int,
    packed_rows: int | None = None,
    bins: list[int] | None = None,
) -> Collator:
    """Token sequences: packed rows of one length, or padded on the right to the longest of the micro-batch."""
    from truthgpt.data.collate import LMCollator, PackedCollator

    if packed_rows is not None:
        return PackedCollator(packed_rows, max_seq_len, pad_token_id)
    return LMCollator(pad_token_id, pad_to_multiple_of, max_seq_len, bins)


@COLLATORS.register("cv", options=CVOptions)
def build_cv_collator(random_resized_crop: bool, horizontal_flip: bool, image_size: int | None) -> Collator:
    """Images of one size with their class, for `model.task: image_classification`."""
    from truthgpt.data.image_collate import ImageCollator

    del random_resized_crop, horizontal_flip, image_size  # done to each image, where it is read
    return ImageCollator()
