"""A real server on a free port of this machine, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn
from starlette.routing import BaseRoute

from tests.serving.fake_engine import FakeEngine
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.serving.engine_thread import EngineThread
from truthgpt.serving.guards import LOOPBACK_HOSTS
from truthgpt.serving.openai_api import create_app
from truthgpt.serving.server import bind

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class RunningServer:
    """A server with a fake engine."""

    def __init__(self, engine: FakeEngine, url: str) -> None:
        self.engine = engine
        self.url = url
        self.client = self.new_client()

    def new_client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, without retries."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "unused", "max_retries": 0, **options})


@contextmanager
def serving(
    engine: FakeEngine | None = None,
    *,
    max_waiting: int = 1024,
    template: str | None = TEMPLATE,
    hosts: Collection[str] | None = LOOPBACK_HOSTS,
    api_key: str | None = None,
    shorten: bool = False,
    routes: Sequence[BaseRoute] = (),
    end_s: int = 2,
) -> Iterator[RunningServer]:
    """Serve inside the block. At its end the server has to stop in time; answers under way have `end_s` to end."""
    engine = engine or FakeEngine()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    thread = EngineThread(engine, max_waiting)
    app = create_app(thread, tokenizer, hosts=hosts, api_key=api_key, shorten=shorten, routes=routes)
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=end_s))
        running = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        running.start()
        wait_until(lambda: server.started)
        running_server = RunningServer(engine, f"http://127.0.0.1:{bound.getsockname()[1]}")
        try:
            yield running_server
        finally:
            server.should_exit = True
            running.join(60)
            running_server.client.close()
            assert not running.is_alive(), "the server does not stop"


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
