"""The measured speed of matrix products."""

from __future__ import annotations

import pytest
import torch

from truthgpt.runtime import matmul_speed
from truthgpt.runtime.flops import peak_flops
from truthgpt.runtime.matmul_speed import measure_matmul_speed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_speed, "CPU_SIZE", 64)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_speed_of_a_cpu(dtype: torch.dtype, name: str) -> None:
    found = measure_matmul_speed(torch.device("cpu"), dtype)
    assert (found.size, found.dtype) == (64, name)
    assert 0 < found.flops_per_s < 1e14


def test_speed_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_speed, "_seconds_by_clock", lambda *matrices: [9.0, 0.5, 0.25])
    assert measure_matmul_speed(torch.device("cpu"), torch.float32).flops_per_s == 2 * 64**3 / 0.5


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure_matmul_speed(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_speed_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    found = measure_matmul_speed(device, torch.bfloat16)
    peak = peak_flops(device, "bf16")
    assert found.size == 8192
    if peak is not None:
        assert 0.4 * peak < found.flops_per_s < 1.05 * peak, "a busy GPU, or the clock is read wrongly"
