"""Errors as the OpenAI API answers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is not answered as asked.

    Attributes:
        status: HTTP status.
        message: what is wrong, what is allowed and how to fix it.
        param: the field of the request that is wrong, if it is one.
        code: a name that programs can compare.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON document of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)
