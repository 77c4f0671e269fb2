"""What is held out for validation: decided by a hash of each key, never by place, order or seed."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)


def key_hash(key: str) -> int:
    """First 64 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def held_out_mask(hashes: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """True for the `round(fraction * n)` smallest hashes, at least one and never all; `(n,)`.

    A fraction of 0 holds none out, nor does a single document or image, with one line that says so.
    """
    held_out = np.zeros(len(hashes), dtype=np.bool_)
    if fraction == 0:
        return held_out
    if len(hashes) < 2:
        logger.warning(
            "the data is a single document or image, so none is held out for validation; set data.validation_path"
        )
        return held_out
    count = min(max(round(fraction * len(hashes)), 1), len(hashes) - 1)
    held_out[np.argsort(hashes, kind="stable")[:count]] = True
    return held_out
