"""Errors as clients see them: one JSON shape, a fixed sentence for everything unexpected.

Nothing of an unknown exception (text, class name, path, address) reaches the client; it goes to the log.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from outrider.errors import EngineDeadError, EngineError, OverloadedError, RequestError

TOO_DEEP = "The body is nested too deeply; flatten it."
INTERNAL_ERROR = "The server failed on this request; its log says why."
RESTART_RETRY_S = 5
MAX_ERROR_CHARS = 1000
"""Errors repeat what the client wrote; so much of it is enough."""


class JSONResponse(Response):
    """JSON encoded by msgspec; takes structs, dicts and lists."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes of ``content``; infinities and NaN become null."""
        return msgspec.json.encode(content)


def error_body(error: Exception) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}`` for any exception."""
    status, kind, param, message = 500, EngineError.type, None, INTERNAL_ERROR
    if isinstance(error, RequestError):
        status, kind, param, message = error.status, error.type, error.param, error.message
    elif isinstance(error, EngineError):
        status, kind, message = error.status, error.type, str(error)
    if len(message) > MAX_ERROR_CHARS:
        message = message[:MAX_ERROR_CHARS] + "…"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(error: Exception) -> Response:
    """The HTTP answer for ``error``; overload says when to come back."""
    body = error_body(error)
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, EngineDeadError):
        headers["Retry-After"] = str(RESTART_RETRY_S)
    return JSONResponse(body, status_code=body["error"]["code"], headers=headers)


async def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application; unexpected errors are logged by the HTTP server."""
    return error_response(error)


async def handle_recursion(request: Request, error: Exception) -> Response:
    """Values that the decoder took may still be nested too deeply for those who walk through them."""
    return error_response(RequestError(TOO_DEEP))


async def handle_disconnect(request: Request, error: Exception) -> Response:
    """The client left before its body was whole: nobody reads this, and nothing is wrong."""
    return Response(status_code=499)
