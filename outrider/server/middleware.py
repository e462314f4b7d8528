"""What happens to every HTTP request before its handler: keys, body size, request ids, HTTP metrics. Raw ASGI.

One class so that a request passes one layer only. Never reads a body beyond counting its bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.errors import OverloadedError, TooLargeError
from outrider.server.errors import JSONResponse, error_response
from outrider.server.metrics import Metrics

MAX_BODY_BYTES = 32 << 20
MAX_HELD_BYTES = 1 << 30
"""Bodies of all requests that are being read or answered; a request that does not fit is told to come back."""

HELD_RETRY_S = 5.0
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})
SEND_BODY = "outrider.send_body"
"""Scope key of a ``send`` for body messages after the start: the layers between it and a handler only read starts."""

STREAMED_BYTES = "outrider.streamed_bytes"
"""Scope key of the number of bytes that went to ``SEND_BODY``; whoever uses that sets it at the end."""

_UNMEASURED = OPEN_PATHS | {"/metrics", "/metrics/", "/load", "/version", "/server_info"}


class Gate:
    """Admits a request or answers it: 401 without a valid key, 413 for a body that is too large, 503 for too many."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_keys: Sequence[str], send_request_id: bool
    ) -> None:
        """Only digests of ``api_keys`` are kept."""
        self._app = app
        self._metrics = metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]
        self._send_request_id = send_request_id
        self._num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[SEND_BODY] = send
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
            await error_response(_too_large())(scope, receive, _closing(send))
            return
        body = _Body(self, receive, send)
        try:
            await self._measured(scope, body, headers.get(b"x-request-id"))
        finally:
            self._num_held_bytes -= body.num_bytes

    def hold(self, num_bytes: int) -> bool:
        """Account for bytes of a body; False when all bodies together are too large."""
        self._num_held_bytes += num_bytes
        return self._num_held_bytes <= MAX_HELD_BYTES

    def _tenant(self, authorization: bytes) -> str | None:
        """The isolation name of the key's owner, empty when there is one key only; None for a wrong key."""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return given.hex() if len(self._digests) > 1 else ""

    async def _measured(self, scope: Scope, body: _Body, request_id: bytes | None) -> None:
        status, num_sent = 500, 0
        start = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status, num_sent
            num_sent += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._send_request_id:
                    message["headers"] = [
                        *message["headers"],
                        (b"x-request-id", request_id or uuid.uuid4().hex.encode()),
                    ]
            await body.send(message)

        try:
            await self._app(scope, body.receive, send_noting_status)
        finally:
            if scope["path"] not in _UNMEASURED:
                handler = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - start
                sizes = body.num_bytes, num_sent + scope.get(STREAMED_BYTES, 0)
                self._metrics.observe_http(scope["method"], handler, status, seconds, *sizes)


class _Body:
    """Counts a request's bytes as they come. One that was refused for them ends its connection with the answer.

    What is left of such a body would otherwise be read for as long as it comes.
    """

    def __init__(self, gate: Gate, receive: Receive, send: Send) -> None:
        self.num_bytes = 0
        self._gate = gate
        self._receive = receive
        self._send, self._send_last = send, _closing(send)
        self._is_refused = False

    async def receive(self) -> Message:
        """The next message; ``TooLargeError`` or ``OverloadedError`` for a client that sends more than fits."""
        message = await self._receive()
        size = len(message.get("body", b"")) if message["type"] == "http.request" else 0
        self.num_bytes += size
        is_held = self._gate.hold(size)
        self._is_refused = bool(size) and (self.num_bytes > MAX_BODY_BYTES or not is_held)
        if self.num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        if size and not is_held:
            text = f"The server holds all the {MAX_HELD_BYTES >> 20} MiB of bodies that it can; try again in"
            raise OverloadedError(f"{text} {HELD_RETRY_S:.0f} s.", retry_after_s=HELD_RETRY_S)
        return message

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on."""
        await (self._send_last if self._is_refused else self._send)(message)


def _closing(send: Send) -> Send:
    """Ends the connection with the answer."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return send_closing


def _too_large() -> TooLargeError:
    return TooLargeError(f"The body is larger than {MAX_BODY_BYTES >> 20} MiB; send less.")
