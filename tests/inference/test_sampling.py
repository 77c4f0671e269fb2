"""The next token: its distribution, and that it is the row's own."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from truthgpt.inference import sampling
from truthgpt.inference.request import Sampling
from truthgpt.inference.sampling import NO_TOKEN, sample, uniform_numbers

GREEDY = Sampling(temperature=0.0)
ODD = [
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.8),
    GREEDY,
    Sampling(temperature=1.0, top_k=40, top_p=0.5, repetition_penalty=1.3),
    Sampling(temperature=2.0),
    Sampling(temperature=0.0, repetition_penalty=1.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, repetition_penalty=0.7),
]
NO_TEXT: list[list[int]] = [[]]


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def reference(logits: np.ndarray, request: Sampling, text: list[int]) -> np.ndarray:
    """Probabilities of one row, in float64, straight from the definitions."""
    scores = logits.astype(np.float64).copy()
    for token in set(text):
        scores[token] *= request.repetition_penalty if scores[token] < 0 else 1 / request.repetition_penalty
    scores /= request.temperature
    order = np.argsort(-scores)
    if request.top_k:
        order = order[: request.top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.append(token)
        mass += weight
        if mass >= request.top_p and request.top_p < 1:
            break
    probabilities = np.zeros_like(scores)
    probabilities[kept] = weights[: len(kept)] / mass
    return probabilities


@pytest.mark.parametrize(
    "request_",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.5, top_k=7),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.2, top_k=20, top_p=0.9, repetition_penalty=1.4),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [30, 300])
def test_tokens_have_the_probabilities_of_the_definition(request_: Sampling, vocab_size: int) -> None:
    draws = 20_000
    logits, text = random_logits(1, vocab_size) / 2, [1, 2, 3, 3, vocab_size - 1]
    expected = reference(logits[0].numpy(), request_, text) * draws
    requests = [Sampling(**{**vars(request_), "seed": n % 100}) for n in range(draws)]
    tokens = sample(logits.expand(draws, -1), requests, [n // 100 for n in range(draws)], [text] * draws)
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rare = expected[~common].sum()
    chi_square = (np.square(counts - expected)[common] / expected[common]).sum()
    chi_square += (counts[~common].sum() - rare) ** 2 / max(rare, 1e-9) if rare else 0
    freedom = int(common.sum()) - (0 if rare else 1)
    assert freedom > 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert chi_square > freedom - 4 * math.sqrt(2 * freedom)  # nor evener than chance


def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by the probabilities that each call looks its tokens up in."""
    seen: list[torch.Tensor] = []
    look_up = sampling._look_up

    def capture(probabilities: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        seen.append(probabilities)
        return look_up(probabilities, numbers)

    monkeypatch.setattr(sampling, "_look_up", capture)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("top_k", [0, 1, 17, 999, 1000, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9, 1 - 1e-6])
def test_probabilities_are_those_of_transformers(
    dtype: torch.dtype, penalty: float, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Sampling(temperature=0.9, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    # Distinct values in every type: what is equal at the edge stays here, and is chosen by its place there.
    values = torch.arange(-500, 500).to(dtype) / 64 if dtype is torch.float16 else random_logits(1, 1000)[0].to(dtype)
    logits = values[torch.randperm(1000, generator=torch.Generator().manual_seed(1))].repeat(2, 1)
    if dtype is torch.bfloat16 and top_p < 1:
        logits = logits.unique()[None].repeat(2, 1)
    texts = [[3, 5, 5, 100], [7]]
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(0.9)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    seen = captured(monkeypatch)
    tokens = sample(logits, [request] * 2, [0, 1], texts)
    for row, text in enumerate(texts):
        expected = steps(torch.tensor([text]), logits[row : row + 1].float()).softmax(-1)[0]
        assert torch.equal(seen[0][row] > 0, expected > 0)
        torch.testing.assert_close(seen[0][row], expected)
        assert expected[tokens[row]] > 0


def test_equally_likely_tokens_at_the_edge_all_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = captured(monkeypatch)
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for request in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.6)):
        sample(logits, [request], [0], NO_TEXT)
    assert [(probabilities > 0).tolist() for probabilities in seen] == [[[True] * 4 + [False]]] * 2


@pytest.mark.parametrize("vocab_size", [1, 5, 128, 129, 257, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_and_among_others(vocab_size: int, dtype: torch.dtype) -> None:
    rows = 64
    logits = random_logits(rows, vocab_size).to(dtype)
    requests = [Sampling(**{**vars(ODD[row % len(ODD)]), "seed": row // 3}) for row in range(rows)]
    positions = [row * 7 % 13 for row in range(rows)]
    texts = [[row % vocab_size, (row * row) % vocab_size] for row in range(rows)]
    tokens = sample(logits, requests, positions, texts)
    for row in range(rows):
        alone = sample(logits[row : row + 1], [requests[row]], [positions[row]], [texts[row]])
        assert alone.tolist() == [int(tokens[row])]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = [[values[row] for row in order] for values in (requests, positions, texts)]
    assert torch.equal(sample(logits[order], *shuffled), tokens[order])
    assert tokens.dtype == torch.int64 and tokens.shape == (rows,)


def test_the_probabilities_too_are_the_rows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens alone would hide a difference in the last bit."""
    seen = captured(monkeypatch)
    sums: list[torch.Tensor] = []
    invert = sampling._invert
    monkeypatch.setattr(sampling, "_invert", lambda weights, u: (sums.append(weights), invert(weights, u))[1])
    logits = random_logits(33, 5003)
    request = Sampling(temperature=0.9, top_p=0.95)
    for rows in (logits, logits[5:6]):
        sample(rows, [request] * len(rows), [0] * len(rows), [[]] * len(rows))
    assert torch.equal(seen[0][5:6], seen[1])
    assert torch.equal(sums[0][5:6], sums[2])


def test_seed_and_position_make_the_token() -> None:
    logits = random_logits(1, 4096) / 10
    tokens = Counter(
        int(sample(logits, [Sampling(temperature=1.0, seed=seed)], [position], NO_TEXT))
        for seed in (0, 1, -1, 2**64, 10**30)
        for position in range(10)
    )
    assert len(tokens) > 40
    again = [sample(logits, [Sampling(temperature=1.0, seed=3)], [5], NO_TEXT).item() for _ in range(2)]
    assert again[0] == again[1]


def test_uniform_numbers_are_uniform_and_never_change() -> None:
    numbers = uniform_numbers([n // 200 for n in range(40_000)], [n % 200 for n in range(40_000)])
    assert len(set(numbers.tolist())) == 40_000
    edges = np.arange(40_001) / 40_000
    ordered = np.sort(numbers)
    distance = max(np.abs(ordered - edges[1:]).max(), np.abs(ordered - edges[:-1]).max())  # Kolmogorov-Smirnov
    assert 0.2 < distance * math.sqrt(40_000) < 1.95
    table = numbers.reshape(200, 200) - 0.5
    for other in (table[:, 1:] * table[:, :-1], table[1:] * table[:-1]):  # neighbours: no correlation
        assert abs(other.mean() * 12) < 4 / math.sqrt(other.size)
    assert uniform_numbers([0, 7], [0, 3]).tolist() == [0.3989128188003649, 0.6743964840201851]


@pytest.mark.parametrize("number", [2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [3, 128, 1000])
def test_a_token_of_probability_zero_is_never_chosen(number: float, vocab_size: int) -> None:
    for kept in ([1], [0], [vocab_size - 1], [0, vocab_size - 1], [1, vocab_size // 2]):
        probabilities = torch.zeros(1, vocab_size)
        probabilities[0, kept] = 1 / len(kept)
        token = int(sampling._look_up(probabilities, np.array([number])))
        assert token == kept[0 if number <= 0.5 else -1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 10**6))
def test_looking_up_is_the_inverse_of_the_cumulative_distribution(vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random((5, vocab_size)) * (rng.random((5, vocab_size)) < rng.random())
    weights[:, rng.integers(vocab_size)] = 1.0
    probabilities = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()
    numbers = rng.random(5).clip(1e-9, 1 - 1e-9)
    tokens = sampling._look_up(probabilities, numbers)
    for row, token in enumerate(tokens.tolist()):
        exact = probabilities[row].double().numpy()
        assert exact[token] > 0
        upper, total = exact[: token + 1].sum(), exact.sum()
        assert (upper - exact[token]) / total - 1e-6 <= numbers[row] <= upper / total + 1e-6


def test_greedy_takes_the_first_of_the_greatest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 5.0]])
    assert sample(logits, [GREEDY] * 3, [0] * 3, [[]] * 3).tolist() == [1, 0, 2]
    again = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, [again, GREEDY, again], [0] * 3, [[1], [0], [2]]).tolist() == [2, 0, 2]


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = random_logits(1, 100) * 1e3
    assert sample(logits, [Sampling(temperature=temperature)], [0], NO_TEXT).item() == logits.argmax()


def test_a_huge_temperature_is_uniform_over_what_is_possible() -> None:
    logits = torch.tensor([[0.0, 50.0, -torch.inf, 1.0]]).expand(3000, -1)
    requests = [Sampling(temperature=1e300, seed=seed) for seed in range(3000)]
    counts = np.bincount(sample(logits, requests, [0] * 3000, [[]] * 3000), minlength=4)
    assert counts[2] == 0
    assert np.abs(counts[[0, 1, 3]] - 1000).max() < 110


@pytest.mark.parametrize("request_", ODD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_no_distribution_gets_no_token(request_: Sampling, dtype: torch.dtype) -> None:
    good = random_logits(1, 300)[0].to(dtype)
    bad = [good.clone() for _ in range(3)]
    bad[0][17] = torch.nan
    bad[1][299] = torch.inf
    bad[2][:] = -torch.inf
    expected = int(sample(good[None], [request_], [4], [[1]]))
    for row in bad:
        tokens = sample(torch.stack([good, row, good]), [request_] * 3, [4] * 3, [[1]] * 3)
        assert tokens.tolist() == [expected, NO_TOKEN, expected]
        mixed = sample(torch.stack([row, good, row]), [request_, GREEDY, request_], [4] * 3, [[1]] * 3)
        assert mixed.tolist() == [NO_TOKEN, int(good.argmax()), NO_TOKEN]


def test_a_token_may_be_ruled_out() -> None:
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 200] = -5.0
    for request in ODD:
        assert sample(logits, [request], [0], [[200, 3]]).item() == 200


class Operations(TorchDispatchMode):
    """Rows each operation has worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if args and isinstance(args[0], torch.Tensor):
            self.rows[name] = self.rows.get(name, 0) + (len(args[0]) if args[0].dim() else 0)
        return func(*args, **(kwargs or {}))


class Unread(list[int]):
    """A text that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("read")

    __iter__ = __getitem__ = __len__  # type: ignore[assignment]


def test_only_rows_that_ask_pay() -> None:
    logits = random_logits(16, 300)
    texts = [Unread() for _ in range(16)]
    with Operations() as greedy:
        sample(logits, [GREEDY] * 16, [0] * 16, texts)
    assert greedy.rows["argmax"] == 16
    assert not {"_to_copy", "sort", "topk", "_softmax", "index"} & set(greedy.rows)
    plain = [Sampling(seed=row) for row in range(16)]
    with Operations() as drawn:
        sample(logits, plain, [0] * 16, texts)
    assert not {"sort", "topk", "index"} & set(drawn.rows)
    sorted_rows: list[int] = []
    least = sampling._least_of_nucleus
    with pytest.MonkeyPatch.context() as patch, Operations() as mixed:
        patch.setattr(sampling, "_least_of_nucleus", lambda s, t: (sorted_rows.append(len(s)), least(s, t))[1])
        requests = [*plain[:12], Sampling(top_k=3), Sampling(top_p=0.5), Sampling(top_k=5), GREEDY]
        sample(logits, requests, [0] * 16, texts)
    assert mixed.rows["topk"] == 2
    assert sorted_rows == [1]


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(len(ODD), 300)
    before = logits.clone()
    sample(logits, ODD, [0] * len(ODD), [[1, 2]] * len(ODD))
    assert torch.equal(logits, before)


def test_the_nucleus_is_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[math.log(4), math.log(2), 0.0, 0.0]])
    assert logits.softmax(-1).tolist() == [[0.5, 0.25, 0.125, 0.125]]
    seen = captured(monkeypatch)
    for top_p in (0.5, 0.51, 0.75):
        sample(logits, [Sampling(temperature=1.0, top_p=top_p)], [0], NO_TEXT)
    assert [int((probabilities > 0).sum()) for probabilities in seen] == [1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0])
def test_a_share_at_either_end_falls_on_a_weight(u: float) -> None:
    """What is left of a number within a chunk of tokens may be rounded to 0 or to 1."""
    index, rest = sampling._invert(torch.tensor([[0.0, 0.0, 3.0, 0.0]]), torch.tensor([[u]]))
    assert (index.item(), rest.item()) == (2, u)
