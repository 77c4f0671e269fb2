"""Every random number of a run comes from a seed derived from the run's own seed and from where it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed for one use, for example `derive_seed(config.seed, "samples", step)`.

    The same arguments give the same value on every machine and Python version; any other number, order or type of
    parts (`1` and `"1"` too) gives an unrelated one.

    Args:
        seed: seed of the run.
        parts: what the seed is for, names and counters.

    Returns:
        An integer in [0, 2**63), which torch, numpy and `random` all accept.
    """
    # JSON keeps 1 and "1" and ["ab"] and ["a", "b"] apart, so that no two argument lists share a text.
    text = json.dumps([seed, *parts], ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed torch's generators (CPU and accelerators) for the dropout of one micro-batch.

    Dropout then depends on nothing that ran before, which is what makes a resumed run exact.

    Args:
        seed: seed of the run.
        step: optimizer step, from 0.
        micro_batch: index of the micro-batch within the step, from 0.
        rank: index of the process, from 0.
    """
    torch.manual_seed(derive_seed(seed, "dropout", step, micro_batch, rank))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """torch's generators, of the CPU and of every accelerator, are afterwards as they were before.

    `fork_rng` does that by itself too, but writes a paragraph of advice on a machine with several GPUs unless they are
    named.
    """
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type  # older torch takes every device for one of CUDA's
    with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind):
        yield
