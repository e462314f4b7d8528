"""What happens to every HTTP request before its handler: keys, body size, request ids, HTTP metrics. Raw ASGI.

One class so that a request passes one layer only. Never reads a body beyond counting its bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.errors import TooLargeError
from outrider.server.errors import JSONResponse, error_response
from outrider.server.metrics import Metrics

MAX_BODY_BYTES = 32 << 20
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})
SEND_BODY = "outrider.send_body"
"""Scope key of a ``send`` for body messages after the start: the layers between it and a handler only read starts."""

_UNMEASURED = OPEN_PATHS | {"/metrics", "/load", "/version", "/server_info"}


class Gate:
    """Admits a request or answers it: 401 without a valid key, 413 for a body that is too large."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_keys: Sequence[str], send_request_id: bool
    ) -> None:
        """Only digests of ``api_keys`` are kept."""
        self._app = app
        self._metrics = metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._send_request_id = send_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[SEND_BODY] = send
        send = _closing(send)
        headers = dict(scope["headers"])
        if self._digests and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            tenant = self._tenant(headers.get(b"authorization", b""))
            if tenant is None:
                unauthorized = {"error": "Unauthorized"}
                response = JSONResponse(unauthorized, 401, headers={"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
            scope["outrider.tenant"] = tenant
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await error_response(_too_large())(scope, receive, send)
            return
        await self._measured(scope, _bounded(receive), send, headers.get(b"x-request-id"))

    def _tenant(self, authorization: bytes) -> str | None:
        """The isolation name of the key's owner, empty when there is one key only; None for a wrong key."""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return given.hex() if len(self._digests) > 1 else ""

    async def _measured(self, scope: Scope, receive: Receive, send: Send, request_id: bytes | None) -> None:
        status = 500
        start = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._send_request_id:
                    message["headers"] = [
                        *message["headers"],
                        (b"x-request-id", request_id or uuid.uuid4().hex.encode()),
                    ]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            if scope["path"] not in _UNMEASURED:
                self._observe(scope, status, time.perf_counter() - start)

    def _observe(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        handler = getattr(scope.get("route"), "path", "none")
        self._metrics.http_requests.labels(scope["method"], f"{status // 100}xx", handler).inc()
        self._metrics.http_seconds.labels(scope["method"], handler).observe(seconds)


def _closing(send: Send) -> Send:
    """Ends the connection after a 413: the rest of the body would otherwise be read for as long as it comes."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 413:
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return send_closing


def _bounded(receive: Receive) -> Receive:
    """Counts body bytes as they come; a client that sends more than allowed gets an error."""
    received = 0

    async def receive_counted() -> Message:
        nonlocal received
        message = await receive()
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _too_large()
        return message

    return receive_counted


def _too_large() -> TooLargeError:
    return TooLargeError(f"The body is larger than {MAX_BODY_BYTES >> 20} MiB; send less.")
