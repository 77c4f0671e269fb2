"""An engine without a model: it writes letters that follow from the prompt and the seed, one a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from truthgpt.errors import ConfigError
from truthgpt.inference.request import FinishReason, Piece, Sampling


@dataclass(frozen=True)
class FakeLoad:
    running: int
    waiting: int
    cache_tokens: int = 1000
    cache_used_tokens: int = 0


def expected_text(prompt_ids: Sequence[int], seed: int, tokens: int) -> str:
    """What the engine writes."""
    start = sum(prompt_ids) + seed
    return "".join(chr(97 + (start + number) % 26) for number in range(tokens))


@dataclass
class FakeEngine:
    """Writes `expected_text`, and ends at a stop text or after `max_new_tokens`.

    `before_step` is called at the start of every step, where a test may wait or raise. A call from another thread than
    the first step's is an error.
    """

    model_name: str = "fake"
    context_tokens: int | None = 200
    step_s: float = 0.0
    slots: int = 256
    before_step: Callable[[], None] = lambda: None
    submitted: list[tuple[list[int], Sampling]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    largest_batch: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self._requests: dict[int, tuple[str, int, Sampling]] = {}
        self._dropped: list[int] = []
        self._thread: threading.Thread | None = None

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        self._check_thread()
        if max(prompt_ids) >= 1000:
            raise ConfigError(f"token id {max(prompt_ids)} is not in the model's vocabulary of 1000")
        self.submitted.append((list(prompt_ids), sampling))
        request_id = len(self.submitted)
        text = expected_text(prompt_ids, sampling.seed, sampling.max_new_tokens)
        self._requests[request_id] = (text, 0, sampling)
        return request_id

    def cancel(self, request_id: int) -> None:
        self._check_thread()
        if request_id in self._requests:
            del self._requests[request_id]
            self.cancelled.append(request_id)
            self._dropped.append(request_id)

    def abandon(self) -> None:
        self._check_thread()
        self._requests.clear()
        self._dropped.clear()

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._dropped)

    def load(self) -> FakeLoad:
        running = min(len(self._requests), self.slots)
        return FakeLoad(running, len(self._requests) - running, cache_used_tokens=10 * running)

    def step(self) -> list[Piece]:
        self._check_thread()
        self.before_step()
        time.sleep(self.step_s)
        self.steps += 1
        pieces = [Piece(request_id, (), "", "cancelled") for request_id in self._dropped]
        self._dropped.clear()
        batch = list(self._requests.items())[: self.slots]
        self.largest_batch = max(self.largest_batch, len(batch))
        return pieces + [self._write(request_id, *state) for request_id, state in batch]

    def _write(self, request_id: int, text: str, done: int, sampling: Sampling) -> Piece:
        letter = text[done]
        finish: FinishReason | None = "length" if done + 1 == len(text) else None
        if letter in sampling.stop:
            letter, finish = "", "stop"
        if finish is None:
            self._requests[request_id] = (text, done + 1, sampling)
        else:
            del self._requests[request_id]
        return Piece(request_id, (ord(text[done]),), letter, finish)

    def _check_thread(self) -> None:
        here = threading.current_thread()
        self._thread = self._thread or here
        assert self._thread is here, "an engine is not for several threads"
