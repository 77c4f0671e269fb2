"""Seeds: stable across machines, different for every use."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.runtime.seeds import derive_seed, random_state_kept, seed_micro_batch

PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=8)), max_size=4).map(tuple)


def test_values_are_fixed_for_ever() -> None:
    assert derive_seed(42) == 7014992390951794165
    assert derive_seed(42, "dropout", 7, 0, 1) == 6324016560478678400
    assert derive_seed(0, "ñ", "") == 6427133621366109494


@given(seed=st.integers(0, 2**63 - 1), parts=PARTS)
def test_range_and_repeatability(seed: int, parts: tuple[int | str, ...]) -> None:
    value = derive_seed(seed, *parts)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, *parts)


@given(first=PARTS, second=PARTS)
def test_different_parts_give_different_seeds(first: tuple[int | str, ...], second: tuple[int | str, ...]) -> None:
    assert (derive_seed(1, *first) == derive_seed(1, *second)) == (first == second)


def test_types_and_borders_of_parts_count() -> None:
    lists: list[tuple[int | str, ...]] = [
        (1,),
        ("1",),
        ("ab",),
        ("a", "b"),
        ("a,b",),
        ('a","b',),
        (),
        ("",),
        (1, 2),
        (12,),
    ]
    assert len({derive_seed(5, *parts) for parts in lists}) == len(lists)


def test_dropout_repeats_for_the_same_place_only() -> None:
    def mask(step: int, micro_batch: int, rank: int) -> torch.Tensor:
        seed_micro_batch(42, step, micro_batch, rank)
        return torch.nn.functional.dropout(torch.ones(64), p=0.5)

    first = mask(3, 1, 0)
    torch.rand(17)  # whatever ran in between changes nothing
    assert torch.equal(first, mask(3, 1, 0))
    for other in (mask(4, 1, 0), mask(3, 0, 0), mask(3, 1, 1), mask(1, 3, 0)):
        assert not torch.equal(first, other)


def test_the_random_state_is_kept_without_advice_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    with random_state_kept():
        torch.rand(3)
    assert torch.equal(state, torch.get_rng_state())
    states = {0: "first", 1: "second"}  # of two GPUs
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for module in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(module, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with random_state_kept():
            states.update({0: "used", 1: "used"})
    assert states == {0: "first", 1: "second"}
