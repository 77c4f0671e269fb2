"""Counters of the server, as text for Prometheus."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from truthgpt.serving.engine_thread import EngineThread
from truthgpt.serving.openai_answers import Usage

logger = logging.getLogger(__name__)


@dataclass
class Metrics:
    """What the server has done since its start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answered requests by path and HTTP status; 499: the client left before its answer was complete."""
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def count(self, path: str, status: int, usage: Usage | None, started: float) -> None:
        """Count a request that is over and log one line about it; `started`: `time.monotonic()` at its start."""
        self.requests[path, status] += 1
        tokens = ""
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens
            self.generated_tokens += usage.completion_tokens
            tokens = f", {usage.prompt_tokens} + {usage.completion_tokens} tokens"
        logger.info("%s %d%s, %.2f s", path, status, tokens, time.monotonic() - started)

    def text(self, thread: EngineThread) -> str:
        """Everything in Prometheus' text format."""
        lines = _lines(
            "requests_total",
            "counter",
            "Requests to write text, by path and HTTP status; 499: the client left.",
            [(f'{{path="{path}",status="{code}"}}', number) for (path, code), number in sorted(self.requests.items())],
        )
        for name, kind, what, value in (
            ("prompt_tokens_total", "counter", "Tokens of the prompts taken.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens written.", self.generated_tokens),
            ("requests_running", "gauge", "Answers that are being written.", thread.running),
            ("requests_waiting", "gauge", "Answers without a token yet.", thread.waiting),
            ("cache_tokens", "gauge", "Tokens the engine's cache has room for.", thread.load.cache_tokens),
            ("cache_used_tokens", "gauge", "Tokens in the engine's cache.", thread.load.cache_used_tokens),
            ("engine_up", "gauge", "1 while the engine can write.", int(thread.state != "failed")),
        ):
            lines += _lines(name, kind, what, [("", value)])
        return "\n".join(lines) + "\n"


def _lines(name: str, kind: str, what: str, values: list[tuple[str, int]]) -> list[str]:
    name = f"truthgpt_{name}"
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *[f"{name}{labels} {value}" for labels, value in values]]
