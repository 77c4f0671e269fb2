"""A server on a port: its socket, its end, and the web server that runs an application."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from truthgpt.errors import ConfigError
from truthgpt.serving.engine_thread import EngineThread

logger = logging.getLogger(__name__)


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


def url_of(bound: socket.socket, host: str) -> str:
    """The address for clients."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


def run_server(
    app: ASGIApp, thread: EngineThread, bound: socket.socket, deadline_s: float, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGINT or SIGTERM, then let answers under way end for `deadline_s` seconds.

    A second SIGINT ends them at once. Logs of the web server go to the loggers `uvicorn`, from warnings on.

    Args:
        thread: started by the application's lifespan.
        on_ready: called once requests are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="on",
        server_header=False,
        # The thread ends the answers before that; this is for clients that do not read them.
        timeout_graceful_shutdown=int(deadline_s) + 2,
    )
    _Server(config, thread, deadline_s, on_ready).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends the engine's answers in time, and leaves quietly after a signal."""

    def __init__(
        self, config: uvicorn.Config, thread: EngineThread, deadline_s: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine_thread = thread
        self._deadline_s = deadline_s
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening and let answers end."""
        ending = asyncio.create_task(self._engine_thread.stop(self._deadline_s))
        await super().shutdown(sockets)
        if self.force_exit:
            ending.cancel()
        else:
            await ending

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
