"""Sampling on a GPU: without waiting for it, and with the CPU's tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from truthgpt.inference.request import Sampling
from truthgpt.inference.sampling import NO_TOKEN, _look_up, sample

pytestmark = pytest.mark.gpu

SETTINGS = [
    Sampling(temperature=0.7, top_k=50),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, top_k=40, top_p=0.5, repetition_penalty=1.3),
    Sampling(temperature=1.0),
]
ROWS = 250


@pytest.mark.parametrize("vocab_size", [300, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [SETTINGS, *([one] for one in SETTINGS)], ids=lambda s: str(len(s)))
def test_no_sync_and_nearly_always_the_tokens_of_the_cpu(
    vocab_size: int, dtype: torch.dtype, settings: list[Sampling]
) -> None:
    logits = (torch.randn(ROWS, vocab_size, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[7, 5] = torch.nan
    requests = [Sampling(**{**vars(settings[row % len(settings)]), "seed": row}) for row in range(ROWS)]
    positions, texts = list(range(ROWS)), [[row, 5, row + 1] for row in range(ROWS)]
    there = logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    tokens = sample(there, requests, positions, texts)
    torch.cuda.set_sync_debug_mode("default")
    expected = sample(logits, requests, positions, texts)
    assert tokens.is_cuda and tokens[7] == NO_TOKEN == expected[7]
    # exp differs in its last bit, so that a number at the very edge of a token may fall on its neighbour.
    assert (tokens.cpu() == expected).float().mean() > 0.98


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    """A parallel sum is not monotone: it may step up by rounding where there is nothing."""
    rows, vocab_size = 2000, 20_000
    generator = torch.Generator("cuda").manual_seed(0)
    probabilities = torch.rand(rows, vocab_size, generator=generator, device="cuda")
    probabilities *= torch.rand(rows, vocab_size, generator=generator, device="cuda") < 0.01
    probabilities /= probabilities.sum(-1, keepdim=True)
    for numbers in (np.linspace(2.0**-53, 1 - 2.0**-53, rows), np.full(rows, 1 - 2.0**-53), np.full(rows, 2.0**-53)):
        tokens = _look_up(probabilities, numbers)
        assert (probabilities.gather(-1, tokens[:, None]) > 0).all()
