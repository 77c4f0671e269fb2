"""Image samples to micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from truthgpt.data.base import Batch, ImageSample


class ImageCollator:
    """Stacks images of one size: `pixel_values`, float32 `(B, C, H, W)`, and `labels`, int64 `(B,)`."""

    def __call__(self, samples: Sequence[ImageSample]) -> Batch:
        """The batch of `samples`, in their order; it owns its memory."""
        return {
            "pixel_values": torch.from_numpy(np.stack([sample["pixel_values"] for sample in samples])),
            "labels": torch.from_numpy(np.array([sample["labels"] for sample in samples], dtype=np.int64)),
        }
