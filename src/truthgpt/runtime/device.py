"""The device: which one, what it is, and how torch is set up for it."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

from truthgpt.errors import ConfigError
from truthgpt.runtime.fallbacks import Fallbacks


def available_device_types() -> list[str]:
    """Device types a run can use here, the preferred one first; `cpu` is always there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, present in found.items() if present]


def choose_device(wanted: str) -> torch.device:
    """The device to train on.

    Args:
        wanted: `auto` (cuda, then mps, then cpu), `cuda`, `mps` or `cpu`. `cuda` is the process's current GPU.

    Raises:
        ConfigError: that device is not here.
    """
    available = available_device_types()
    kind = available[0] if wanted == "auto" else wanted
    if kind not in available:
        why = (
            "this torch was built without CUDA" if kind == "cuda" and torch.version.cuda is None else "torch sees none"
        )
        raise ConfigError(
            f"hardware.device: {wanted} is not available here ({why}); available: {', '.join(available)}. "
            f"Set hardware.device to auto or to one of these"
        )
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def describe_hardware(device: torch.device) -> dict[str, str | int | None]:
    """What the run computes on: `device`, its `name` and `memory_bytes` (the host's for a CPU; null when not known),
    usable `cores` and `torch_threads`."""
    on_gpu = device.type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else _host_memory_bytes(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def configure_backends(device: torch.device, allow_tf32: bool, deterministic: bool) -> None:
    """Set up torch for this process. Call it before the first CUDA kernel.

    Args:
        device: where the run computes.
        allow_tf32: let float32 matrix products and convolutions use TF32 on a GPU that has it.
        deterministic: allow deterministic kernels only; an operation without one then raises a RuntimeError that
            names it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = allow_tf32
        # Autotuning picks kernels by their speed of the day, which makes runs differ.
        torch.backends.cudnn.benchmark = False
        if deterministic:
            # cuBLAS reads it when its first handle is made: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def usable_cores() -> int:
    """Processor cores this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cap_workers(wanted: int, fallbacks: Fallbacks) -> int:
    """`wanted` loader processes, but no more than usable cores; fewer is recorded as a fallback.

    Raises:
        ConfigError: fewer are possible and `fallbacks` is strict.
    """
    cores = usable_cores()
    if wanted <= cores:
        return wanted
    fallbacks.take("data.num_workers", str(wanted), str(cores), f"usable processor cores here: {cores}")
    return cores


def is_amd_processor() -> bool:
    """Whether the host's processor is one of AMD's."""
    return "AuthenticAMD" in (_cpuinfo("vendor_id") or platform.processor())


def _processor_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str | None:
    """What Linux says of the first processor; None elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, what torch's allocator keeps unused among it; None: not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    kibibytes = next((int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)
    return None if kibibytes is None else kibibytes * 1024


def _host_memory_bytes() -> int | None:
    # Windows has no sysconf, and not every Unix knows these two names.
    if not hasattr(os, "sysconf") or not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_triton() -> bool:
    """Whether Triton is installed: PyTorch's CUDA builds for Linux bring it."""
    return importlib.util.find_spec("triton") is not None
