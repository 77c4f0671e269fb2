"""Who may ask: the Host header against DNS rebinding, the API key, and the size of a body."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from truthgpt.serving.api_error import ApiError

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Names of this machine in a Host header. A web page elsewhere that has its own name resolve to 127.0.0.1 sends that
name, and is refused."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HostGuard:
    """Answers only requests whose Host header is one of `hosts`, with or without a port."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] == "http" and _host_of(scope) not in self._hosts:
            allowed = ", ".join(sorted(self._hosts))
            refused = ApiError(403, f"the Host header is not one of {allowed}", code="host_not_allowed")
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class KeyGuard:
    """Answers only requests with `Authorization: Bearer KEY`, save those for one of the `public` paths."""

    def __init__(self, app: ASGIApp, key: str, public: Collection[str]) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401."""
        if scope["type"] == "http" and scope["path"] not in self._public:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                refused = ApiError(
                    401, "wrong or missing API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
                )
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _host_of(scope: Scope) -> str:
    """The Host header without its port, in lower case; empty without one."""
    host = Headers(scope=scope).get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
