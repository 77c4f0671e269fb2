"""What is left of a recording that fails: nothing. With a stand-in for torch's own, which needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from truthgpt.runtime.cuda_graph import CaptureError, recording

POOL = (0, 1)


class Machine:
    """The current stream, the pools that take memory, and the generator, as torch leaves them."""

    def __init__(self, end_fails: bool) -> None:
        self.main = self.stream = SimpleNamespace(device=SimpleNamespace(index=0))
        self.pools: list[tuple[int, int]] = []
        self.recorded = False
        self.end_fails = end_fails
        self.generator = SimpleNamespace(capturing=False, clone_state=lambda: "clone", graphsafe_set_state=self._set)

    def _set(self, state: str) -> None:
        self.generator.capturing = state != "clone"

    def end(self, index: int, pool: tuple[int, int]) -> None:
        if (index, pool) != (0, POOL) or pool not in self.pools:
            raise RuntimeError("not recording to this pool")
        self.pools.remove(pool)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Machine]:
    def started(end_fails: bool) -> Machine:
        machine = Machine(end_fails)

        class Recording:
            def __init__(self, graph: Any, pool: Any, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                self._pool = pool

            def __enter__(self) -> None:
                machine.stream = SimpleNamespace(device=machine.main.device)
                machine.pools.append(self._pool)
                machine.generator.capturing = True

            def __exit__(self, kind: Any, *_: object) -> None:
                if kind is not None and machine.end_fails:
                    raise RuntimeError("CUDA error: a previous error during capture\nlong story")
                machine.end(0, self._pool)
                machine.generator.capturing, machine.stream = False, machine.main
                machine.recorded = kind is None

        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: machine.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(machine, "stream", stream))
        monkeypatch.setattr(torch.cuda, "default_generators", (machine.generator,))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", machine.end, raising=False)
        return machine

    return started


def record(error: Exception | None) -> None:
    with recording(object(), POOL):  # type: ignore[arg-type]
        if error is not None:
            raise error


@pytest.mark.parametrize("end_fails", [True, False])
@pytest.mark.parametrize(
    ("error", "seen", "says"),
    [
        (
            RuntimeError("reads a value\nlong story"),
            CaptureError,
            "CUDA graph: reads a value$",
        ),
        (RuntimeError(), CaptureError, "as a CUDA graph: $"),
        (torch.OutOfMemoryError("2 GiB"), torch.OutOfMemoryError, "^2 GiB$"),
    ],
)
def test_nothing_is_left_of_one_that_fails(
    start: Callable[[bool], Machine], error: Exception, seen: type[Exception], says: str, end_fails: bool
) -> None:
    machine = start(end_fails)
    with pytest.raises(seen, match=says):
        record(error)
    assert machine.stream is machine.main and not machine.pools and not machine.generator.capturing
    assert not machine.recorded


def test_one_that_succeeds(start: Callable[[bool], Machine]) -> None:
    machine = start(False)
    record(None)
    assert machine.recorded and not machine.pools
