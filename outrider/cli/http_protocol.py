"""uvicorn's HTTP/1.1 protocol with bounds: how much a client may send before it is known, and how slowly.

Given to uvicorn by ``http_server``. A connection that breaks a bound is answered in one line and closed. Knows no
routes; the size of a body is bounded by the server's gate, its pace here.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_URL_BYTES = 8 << 10
MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 100
HEADER_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its headers."""

BODY_S = 30.0
MIN_BODY_BYTES_PER_S = 1024
"""A body may take ``BODY_S`` seconds and one more for each KiB that has arrived."""

STALLED_READER_S = 60.0
"""How long a client may leave more than uvicorn's high-water mark of its answer unread."""

logger = logging.getLogger("uvicorn.error")


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    _deadline: asyncio.TimerHandle | None = None
    _reader_deadline: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _num_body_bytes = 0
    _begun_s = 0.0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; its headers must follow."""
        super().connection_made(transport)
        self._expect(HEADER_S, "headers")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended, from either side."""
        for timer in (self._deadline, self._reader_deadline):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # -- what arrives --------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; nothing is read from a client that has been refused."""
        if not self._refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._num_header_bytes = self._num_body_bytes = 0
        if self._deadline is None:
            self._expect(HEADER_S, "headers")

    def on_url(self, url: bytes) -> None:
        """A piece of the request line's target."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(HTTPStatus.REQUEST_URI_TOO_LONG)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer of a chunked body."""
        super().on_header(name, value)
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """The handler starts; the body has its own clock."""
        if self._refused:
            return
        self._begun_s = self.loop.time()
        self._expect(BODY_S, "a body")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body buys time for the next."""
        if self._refused:
            return
        super().on_body(body)
        self._num_body_bytes += len(body)
        allowed_s = BODY_S + self._num_body_bytes / MIN_BODY_BYTES_PER_S
        self._expect(allowed_s - (self.loop.time() - self._begun_s), "a body")

    def on_message_complete(self) -> None:
        """The request is whole; from here on the server is the slow one."""
        self._stop_clock()
        if not self._refused:
            super().on_message_complete()

    def _expect(self, seconds: float, what: str) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(max(0.0, seconds), self._late, what)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, what: str) -> None:
        logger.info("A client was too slow to send %s; its connection is closed.", what)
        self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer, unless an answer has begun, and close."""
        if self._refused:
            return
        self._refused = True
        self._stop_clock()
        cycle = cast(Any, self.cycle)
        if cycle is None or cycle.response_complete or not cycle.response_started:
            if cycle is not None:
                cycle.disconnected = True  # the handler must not answer as well
            line = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(line.encode("ascii"))
        self.transport.close()

    # -- what is read --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client does not keep up with its answer."""
        super().pause_writing()
        self._reader_deadline = self.loop.call_later(STALLED_READER_S, self._drop_reader)

    def resume_writing(self) -> None:
        """It caught up."""
        super().resume_writing()
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def _drop_reader(self) -> None:
        logger.info(
            "A client did not read its answer for %.0f s; its connection is closed.", STALLED_READER_S
        )
        self.transport.abort()
