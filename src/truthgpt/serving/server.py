"""A server on a port: its socket, its end, and the web server that runs an application."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from truthgpt.errors import ConfigError
from truthgpt.serving.base import TextEngine
from truthgpt.serving.engine_thread import DEFAULT_MAX_WAITING, EngineThread
from truthgpt.serving.guards import LOOPBACK_HOSTS, is_loopback
from truthgpt.serving.openai_api import STOP_DEADLINE_S, create_app

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread waits for the event loop's, or the other way round, where both have Python to run; a
step of the engine takes 2 ms, and Python's own 5 ms would be most of it."""
KEEP_ALIVE_S = 75
"""How long a connection stays open without a request. Longer than clients keep theirs (httpx, and so OpenAI's client: 5
seconds, which is uvicorn's default too): else one may be closed while a request is on its way through it."""


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and for whom.

    Args:
        host: address to listen at. On a loopback address only requests that name this machine as their host are
            answered: a web page elsewhere cannot reach the server through a name of its own.
        port: 0: any that is free.
        api_key: what clients have to send as `Authorization: Bearer KEY`; None: nothing.
        max_waiting: requests that may wait for their first token, 1 or more.
        shorten: write as many new tokens as fit where more are asked for, instead of refusing the request.

    Raises:
        ConfigError: other machines can reach the server, and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_waiting: int = DEFAULT_MAX_WAITING
    shorten: bool = False

    def __post_init__(self) -> None:
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} lets other machines in, so clients need a key: put one into an environment "
                "variable and give its name, --api-key-env NAME (or leave --host out)"
            )

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """Host headers that are answered; None: all."""
        return LOOPBACK_HOSTS | {in_url(self.host)} if is_loopback(self.host) else None


def in_url(host: str) -> str:
    """The address as URLs and Host headers have it."""
    return f"[{host}]" if ":" in host else host


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; port 0: any that is free.

    Raises:
        ConfigError: the port is in use or not allowed, or `host` is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host: {host} is no address: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot serve at {host}, port {port}: {reason}; give another --port (0: any)") from error
    return bound


def serve_engine(
    open_engine: Callable[[], AbstractContextManager[tuple[TextEngine, PreTrainedTokenizerBase]]],
    options: ServerOptions,
    on_ready: Callable[[str, str, bool], None],
    routes: Sequence[BaseRoute] = (),
) -> None:
    """Serve a model until SIGINT or SIGTERM, then let answers under way end; a second signal ends them at once.

    Logs of the web server go to the logger `uvicorn.error`, from warnings on.

    Args:
        open_engine: gives the engine and its tokenizer for as long as it is served, after the port has been taken.
        options: where and for whom.
        on_ready: called with the server's URL, the model's name and whether it has a chat template, once requests
            are taken.
        routes: more routes, for pages; read after the engine has been made.

    Raises:
        ConfigError: see `bind`; and what `open_engine` raises.
    """
    with bind(options.host, options.port) as bound, open_engine() as (engine, tokenizer):
        thread = EngineThread(engine, options.max_waiting)
        app = create_app(
            thread,
            tokenizer,
            hosts=options.allowed_hosts,
            api_key=options.api_key,
            shorten=options.shorten,
            routes=routes,
        )
        url = f"http://{in_url(options.host)}:{bound.getsockname()[1]}"
        chats = tokenizer.chat_template is not None
        run_app(app, thread, bound, lambda: on_ready(url, thread.model_name, chats))


def run_app(app: ASGIApp, thread: EngineThread, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    """Run an application whose lifespan starts `thread`, until a signal; see `serve_engine`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        # The thread ends the answers before that; this is for clients that do not read them.
        timeout_graceful_shutdown=int(STOP_DEADLINE_S) + 2,
    )
    before, log = sys.getswitchinterval(), logging.getLogger("uvicorn.error")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    log.addFilter(_tells_of_an_error)
    try:
        _Server(config, thread, on_ready).run(sockets=[bound])
    finally:
        log.removeFilter(_tells_of_an_error)
        sys.setswitchinterval(before)


def _tells_of_an_error(record: logging.LogRecord) -> bool:
    """Not that an answer was broken off at the end, for a client that does not read it: uvicorn takes that for an error
    of the application, and shows its traceback."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """Ends the engine's answers in time, and leaves quietly after a signal."""

    def __init__(self, config: uvicorn.Config, thread: EngineThread, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine_thread = thread
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening and let answers end."""
        ending = asyncio.create_task(self._engine_thread.stop(STOP_DEADLINE_S))
        await super().shutdown(sockets)
        await ending
        if self.force_exit:
            await self.lifespan.shutdown()  # uvicorn leaves it out, and the application is told by an exception

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at the first signal; at the second wait for no answer."""
        if self.should_exit:
            self._engine_thread.hurry()
            self.force_exit = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, without raising the signal again at the end: stopping a server is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
