"""Choosing and describing a device, and setting up torch for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from truthgpt.errors import ConfigError
from truthgpt.runtime import device as device_module
from truthgpt.runtime.device import (
    cap_workers,
    choose_device,
    configure_backends,
    describe_hardware,
    is_amd_processor,
    usable_cores,
)
from truthgpt.runtime.fallbacks import Fallbacks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("wanted", "cuda", "mps", "expected"),
    [
        ("auto", True, True, "cuda:1"),
        ("auto", False, True, "mps"),
        ("auto", False, False, "cpu"),
        ("cpu", True, True, "cpu"),
        ("cuda", True, False, "cuda:1"),
        ("mps", True, True, "mps"),
    ],
)
def test_choice(wanted: str, cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=cuda, mps=mps)
    assert str(choose_device(wanted)) == expected


@pytest.mark.parametrize(
    ("wanted", "cuda", "available"), [("cuda", False, "available: cpu."), ("mps", True, "available: cuda, cpu.")]
)
def test_a_missing_device_is_an_error(wanted: str, cuda: bool, available: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=cuda, mps=False)
    with pytest.raises(ConfigError, match=r"hardware\.device") as caught:
        choose_device(wanted)
    assert f"{wanted} is not available here" in str(caught.value)
    assert available in str(caught.value)


def test_description_of_a_cpu() -> None:
    hardware = describe_hardware(CPU)
    assert list(hardware) == ["device", "name", "memory_bytes", "cores", "torch_threads"]
    assert hardware["device"] == "cpu"
    assert hardware["name"]
    assert hardware["cores"] == usable_cores() >= 1
    assert hardware["torch_threads"] == torch.get_num_threads()
    memory = hardware["memory_bytes"]
    assert memory is None or (isinstance(memory, int) and memory > 2**28)


@pytest.mark.parametrize("allow_tf32", [True, False])
def test_tf32_on_a_gpu(allow_tf32: bool) -> None:
    torch.backends.cudnn.benchmark = True
    configure_backends(torch.device("cuda"), allow_tf32=allow_tf32, deterministic=False)
    assert torch.get_float32_matmul_precision() == ("high" if allow_tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 is allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_tf32_leaves_a_cpu_alone() -> None:
    torch.set_float32_matmul_precision("highest")
    configure_backends(CPU, allow_tf32=True, deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest"


def test_deterministic_mode_goes_on_and_off() -> None:
    configure_backends(torch.device("cuda"), allow_tf32=True, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    configure_backends(CPU, allow_tf32=True, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    configure_backends(torch.device("cuda"), allow_tf32=True, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own choice stays"


def test_workers_are_capped_once_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "usable_cores", lambda: 3)
    fallbacks = Fallbacks()
    assert [cap_workers(wanted, fallbacks) for wanted in (0, 1, 3)] == [0, 1, 3]
    assert fallbacks.to_json() == []
    assert cap_workers(8, fallbacks) == 3
    taken = fallbacks.to_json()
    assert [(f["part"], f["wanted"], f["used"]) for f in taken] == [("data.num_workers", "8", "3")]
    with pytest.raises(ConfigError, match=r"data\.num_workers"):
        cap_workers(8, Fallbacks(strict=True))


def test_cores_follow_the_affinity() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)


@pytest.mark.parametrize(
    ("cpuinfo", "elsewhere", "is_amd"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel Xeon\n", "", False),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", "aarch64", False),
        (None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        (None, "AMD64 Family 6 Model 85 Stepping 7, GenuineIntel", False),
        (None, "arm", False),
    ],
)
def test_makers_of_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, elsewhere: str, is_amd: bool
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(device_module, "Path", lambda _: path)
    monkeypatch.setattr(platform, "processor", lambda: elsewhere)
    assert is_amd_processor() == is_amd
