"""The next token of many sequences at once, each by its own settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from truthgpt.inference.request import Sampling

NO_TOKEN = -1
"""What `sample` gives for a row whose logits are no distribution: a NaN, +inf, or nothing above -inf in it."""

Array = npt.NDArray[Any]

_CHUNK = 128


def sample(
    logits: Tensor, requests: Sequence[Sampling], positions: Sequence[int], texts: Sequence[Sequence[int]]
) -> Tensor:
    """Choose the next token of every row.

    Repetition penalty, temperature, top-k and top-p follow each other in the order and with the meaning they have in
    transformers' `generate`, in float32; of tokens equally likely at the edge of top-k or top-p all stay. Then one
    uniform number, a hash of the request's seed and position, is looked up in the row's cumulative probabilities. On
    the CPU a row's token depends on nothing in the other rows, bit for bit. A token of probability 0 is never chosen.

    No row waits for the device: rows without a distribution are marked in the result, and whoever reads it must look.

    Args:
        logits: `(B, V)`, any floating type; left as they are.
        requests: how each row is sampled.
        positions: tokens each row has written so far, 0 for its first.
        texts: all token ids of each row, prompt and answer; read only where a repetition penalty is asked for.

    Returns:
        int64 `(B,)` on the logits' device; `NO_TOKEN` for a row that has a NaN, +inf, or only -inf.
    """
    penalised = [row for row, request in enumerate(requests) if request.repetition_penalty != 1]
    if penalised:
        logits = _penalise(logits, penalised, requests, texts)
    drawn = [row for row, request in enumerate(requests) if request.temperature > 0]
    if not drawn:
        return _likeliest(logits)
    if len(drawn) == len(requests):
        return _draw(logits, requests, positions)
    rows = _on_device(np.array(drawn), logits.device)
    tokens = _draw(logits[rows], [requests[row] for row in drawn], [positions[row] for row in drawn])
    return _likeliest(logits).index_copy_(0, rows, tokens)


def uniform_numbers(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each (seed, position), a function of the two alone: BLAKE2b, 52 bits of it.

    Args:
        seeds: any integers.
        positions: as many.

    Returns:
        float64, at least 2**-53 and at most 1 - 2**-53.
    """
    # Formatting and hashing take 0.5 microseconds a row; numpy's Philox takes 8 to be set up.
    digests = b"".join(
        hashlib.blake2b(b"%d %d" % pair, digest_size=8).digest() for pair in zip(seeds, positions, strict=True)
    )
    numbers = np.frombuffer(digests, dtype="<u8") >> np.uint64(12)
    return np.asarray((numbers + 0.5) * 2.0**-52, dtype=np.float64)


def _likeliest(logits: Tensor) -> Tensor:
    """The first of each row's greatest values: `(B, V)` to `(B,)`."""
    tokens = logits.argmax(dim=-1)
    # argmax takes a NaN for the greatest of all, so the value it found says whether the row is sound.
    found = logits.gather(-1, tokens[:, None])[:, 0]
    return torch.where(found.isfinite(), tokens, NO_TOKEN)


def _penalise(logits: Tensor, rows: list[int], requests: Sequence[Sampling], texts: Sequence[Sequence[int]]) -> Tensor:
    """The logits in float32, those of tokens that stand in the text made less likely (Keskar 2019) in `rows`."""
    device, lengths = logits.device, [len(texts[row]) for row in rows]
    places = np.stack(
        [np.repeat(np.arange(len(rows)), lengths), np.concatenate([np.asarray(texts[row], np.int64) for row in rows])]
    )
    row, token = _on_device(places, device)
    penalties = _on_device(np.array([[requests[row].repetition_penalty] for row in rows], np.float32), device)
    chosen = _on_device(np.array(rows), device)
    scores = logits.float()[chosen]  # (R, V)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    seen[row, token] = True
    changed = torch.where(scores < 0, scores * penalties, scores / penalties)
    return logits.float().index_copy(0, chosen, torch.where(seen, changed, scores))


def _draw(logits: Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> Tensor:
    """Sample every row, all of which have a temperature above 0: `(B, V)` to `(B,)`."""
    device, vocab_size = logits.device, logits.shape[-1]
    # Beyond these bounds float32 quotients overflow; the distribution is the same: greedy, or uniform.
    temperatures = np.clip(np.array([[r.temperature] for r in requests]), 1e-30, 1e30).astype(np.float32)
    scores = logits.float() / _on_device(temperatures, device)
    few = [row for row, request in enumerate(requests) if 0 < request.top_k < vocab_size]
    if few:
        scores = _cut(scores, few, _kth_greatest, np.array([[requests[row].top_k] for row in few]))
    nucleus = [row for row, request in enumerate(requests) if request.top_p < 1]
    if nucleus:
        tails = np.array([[1 - requests[row].top_p] for row in nucleus], np.float32)
        scores = _cut(scores, nucleus, _least_of_nucleus, tails)
    return _look_up(scores.softmax(dim=-1), uniform_numbers([request.seed for request in requests], positions))


def _cut(scores: Tensor, rows: list[int], floor: Callable[[Tensor, Array], Tensor], settings: Array) -> Tensor:
    """-inf for all scores of `rows` below the floor that `floor` finds from them and their settings, `(R, 1)` each."""
    chosen = _on_device(np.array(rows), scores.device)
    kept = scores[chosen]
    return scores.index_copy(0, chosen, kept.masked_fill(kept < floor(kept, settings), -torch.inf))


def _kth_greatest(scores: Tensor, counts: Array) -> Tensor:
    greatest = scores.topk(int(counts.max()), dim=-1).values
    return greatest.gather(-1, _on_device(counts - 1, scores.device))


def _least_of_nucleus(scores: Tensor, tails: Array) -> Tensor:
    """The score of the least likely token that has to stay (Holtzman 2020); `tails`: the mass that may go at most."""
    if scores.device.type == "cpu":  # numpy sorts 30 times faster than torch, which also sorts the places
        ascending = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    else:
        ascending = scores.sort(dim=-1).values
    gone = ascending.softmax(dim=-1).cumsum(dim=-1) <= _on_device(tails, scores.device)
    return ascending.gather(-1, gone.sum(dim=-1, keepdim=True).clamp_(max=scores.shape[-1] - 1))


def _look_up(probabilities: Tensor, numbers: Array) -> Tensor:
    """The inverse of each row's cumulative distribution: `(B, V)` and B numbers in (0, 1) to `(B,)`.

    First among sums of 128 tokens, then within the one found, so that only few numbers are added up in float64.
    """
    vocab_size = probabilities.shape[-1]
    chunks = functional.pad(probabilities, (0, -vocab_size % _CHUNK)).view(
        len(probabilities), -1, _CHUNK
    )  # (B, C, 128)
    precise = torch.float32 if probabilities.device.type == "mps" else torch.float64  # MPS has no float64
    u = _on_device(numbers, probabilities.device, precise)[:, None]
    sums = chunks.sum(dim=-1).to(precise)
    chunk, u = _invert(sums, u)
    within = chunks.take_along_dim(chunk[:, :, None], dim=1)[:, 0].to(precise)
    token, _ = _invert(within, u)
    sound = sums.sum(dim=-1).isfinite()  # softmax makes a row of NaN from one that is no distribution
    return torch.where(sound, (chunk * _CHUNK + token)[:, 0], NO_TOKEN)


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where the share `u`, `(B, 1)` in [0, 1], of the weights `(B, N)` falls, and which share of that weight it is."""
    # A parallel sum can step up, by rounding, at a weight of 0: such places are left out.
    cumulative = weights.cumsum(dim=-1).masked_fill(weights <= 0, -1.0)
    target = u * cumulative.amax(dim=-1, keepdim=True)
    index = (cumulative >= target).to(torch.uint8).argmax(dim=-1, keepdim=True)
    weight = weights.gather(-1, index)
    below = cumulative.gather(-1, index) - weight
    return index, ((target - below) / weight).clamp(0.0, 1.0)


def _on_device(values: Array, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The values as a tensor there, sent without waiting."""
    tensor = torch.from_numpy(values)
    tensor = tensor if dtype is None else tensor.to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
