"""The batch of images: order, shapes, types, and memory of its own."""

from __future__ import annotations

import numpy as np
import torch

from truthgpt.data.base import ImageSample
from truthgpt.data.image_collate import ImageCollator


def sample(label: int) -> ImageSample:
    pixels = np.full((3, 4, 5), label / 10, dtype=np.float32)
    return {"pixel_values": pixels, "labels": np.array(label, dtype=np.int64)}


def test_images_are_stacked_in_order() -> None:
    samples = [sample(label) for label in (2, 0, 7)]
    batch = ImageCollator()(samples)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 4, 5) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [2, 0, 7]
    for row, each in enumerate(samples):
        assert np.array_equal(batch["pixel_values"][row].numpy(), each["pixel_values"])
    samples[0]["pixel_values"][:] = 9
    assert batch["pixel_values"].max() < 1, "the batch must not share memory with the samples"


def test_one_image() -> None:
    batch = ImageCollator()([sample(1)])
    assert batch["pixel_values"].shape == (1, 3, 4, 5) and batch["labels"].shape == (1,)
