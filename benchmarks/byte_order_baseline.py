"""Bits per byte of a byte n-gram model on the default run's validation split: what "visibly learning" is held against.

    python benchmarks/byte_order_baseline.py [CONFIG] [key=value ...] [--json]

An order-k model predicts a byte from the k bytes before it. Counts are taken on the training split; each order is
smoothed with the one below, p_k = (count + alpha * p_(k-1)) / (total + alpha), down to the uniform distribution;
alpha is the best of a few on the validation split, which favours the n-gram model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from truthgpt import load_config
from truthgpt.build_sources import build_text_data
from truthgpt.cli.output import split_arguments
from truthgpt.data.split import DocumentSet

ORDERS = (0, 1, 2, 3)
ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
Bytes = npt.NDArray[np.uint64]


def document_bytes(parts: Sequence[DocumentSet]) -> Bytes:
    """All documents, a NUL byte between them as a border."""
    texts = (document.text.encode() for document in chain.from_iterable(parts))
    return np.frombuffer(b"\0".join(texts), dtype=np.uint8).astype(np.uint64)


def contexts(text: Bytes, order: int) -> tuple[Bytes, Bytes]:
    """Keys of (context, byte) and of context, for every byte with `order` bytes before it."""
    length = len(text) - order
    key = np.zeros(length, dtype=np.uint64)
    for offset in range(order):
        key = key * np.uint64(256) + text[offset : offset + length]
    return key * np.uint64(256) + text[order:], key


def counts(train: Bytes, validation: Bytes) -> npt.NDArray[np.float64]:
    """How often each key of `validation` occurs in `train`."""
    keys, occurrences = np.unique(train, return_counts=True)
    place = np.minimum(np.searchsorted(keys, validation), len(keys) - 1)
    found = keys[place] == validation
    return np.where(found, occurrences[place], 0).astype(np.float64)


def bits_per_byte(train: Bytes, validation: Bytes, alpha: float) -> dict[int, float]:
    """Mean code length of the validation bytes under the model of each order."""
    longest = max(ORDERS)
    probability = np.full(len(validation) - longest, 1 / 256)
    result = {}
    for order in ORDERS:
        joint, context = contexts(train, order)
        joint_validation, context_validation = contexts(validation, order)
        skip = longest - order  # the same bytes are scored at every order
        seen = counts(joint, joint_validation)[skip:]
        total = counts(context, context_validation)[skip:]
        probability = (seen + alpha * probability) / (total + alpha)
        result[order] = float(-np.log2(probability).mean())
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="[CONFIG] [key=value ...]")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    source, overrides = split_arguments(options.arguments)
    parts = build_text_data(load_config(source, overrides)).parts
    training = [part.train for part in parts if isinstance(part.train, DocumentSet)]
    held_out = [part.validation for part in parts if part.validation is not None]
    if not training or not held_out:
        sys.exit("training and validation documents are needed: no data.streaming, data.validation_fraction above 0")
    train, validation = document_bytes(training), document_bytes(held_out)
    rows = [bits_per_byte(train, validation, alpha) for alpha in ALPHAS]
    best = {order: min(row[order] for row in rows) for order in ORDERS}
    document = {
        "python": sys.version.split()[0],
        "data_digest": hashlib.sha256(" ".join(part.digest for part in [*training, *held_out]).encode()).hexdigest(),
        "train_documents": sum(map(len, training)),
        "train_bytes": len(train),
        "validation_documents": sum(map(len, held_out)),
        "validation_bytes": len(validation),
        "bits_per_byte": {f"order {order}": round(value, 4) for order, value in best.items()},
    }
    if options.as_json:
        print(json.dumps(document, indent=2))
        return
    for key, value in document.items():
        print(f"{key:22} {value}")


if __name__ == "__main__":
    main()
