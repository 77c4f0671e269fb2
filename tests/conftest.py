"""What every test gets: no network, a cache of its own, one compute thread, and processes forked from a warm server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported: two pytest workers on two cores must not each start two compute threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.process import Cli, block_network

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# An example may take as long as the machine is busy. All else stays: in continuous integration the examples are fixed.
settings.register_profile("tests", parent=settings.default, deadline=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> None:
    block_network()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One token cache and one dataset cache a session, never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRUTHGPT_CACHE_DIR", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """A DataLoader leaves a handler behind that raises wherever the next test is when it kills a process."""
    numbers = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs `truthgpt` commands in a process of their own, in the test's own folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """GPU tests are skipped without a GPU."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN is the faster one, whatever processor this is."""
    import torch

    from truthgpt.runtime import onednn

    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call, unused-ignore]
        pytest.skip("needs oneDNN and MKL")
    monkeypatch.setattr(onednn, "is_amd_processor", lambda: True)
    onednn.is_faster.cache_clear()
    yield
    onednn.is_faster.cache_clear()
