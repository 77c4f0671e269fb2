"""What is held out for validation: decided by a hash of each key, never by place, order or seed."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

MUCH_HELD_OUT = 0.1
"""A share of the data that its owner would miss in training."""


def key_hash(key: str) -> int:
    """First 64 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def held_out_mask(hashes: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """True for the `round(fraction * n)` smallest hashes, at least one and never all; `(n,)`.

    Equal keys are always on the same side, so that no text is both trained on and validated on: there may be a few more
    held out. A fraction of 0 holds none out, nor does data of a single key, with one line that says so; another line
    says where a tenth of the data and twice the fraction is exceeded, as of a few large files.
    """
    if fraction == 0:
        return np.zeros(len(hashes), dtype=np.bool_)
    count = min(max(round(fraction * len(hashes)), 1), max(len(hashes) - 1, 1))
    last = np.partition(hashes, count - 1)[count - 1]
    held_out: npt.NDArray[np.bool_] = hashes <= last
    if held_out.all():
        held_out = hashes < last
    if not held_out.any():
        logger.warning(
            "the data is a single document or image, so none is held out for validation; set data.validation_path"
        )
    if held_out.mean() > max(2 * fraction, MUCH_HELD_OUT):
        logger.warning(
            "%d of %d documents or images are held out for validation, which asked for a share of %g: they are few, or "
            "many are equal; set data.validation_path, or data.validation_fraction: 0 to train on all of them",
            held_out.sum(),
            len(hashes),
            fraction,
        )
    return held_out
