"""Server-sent events and the watch for clients that leave, on raw ASGI; used by the completions and chat handlers.

A stream costs one task that listens for the disconnect beside the one that writes. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outrider.errors import EngineError, RequestError
from outrider.server.errors import error_body
from outrider.server.middleware import SEND_BODY, STREAMED_BYTES

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499

logger = logging.getLogger("outrider.server")


def sse(value: object) -> bytes:
    """One event whose data is ``value`` as JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``; cancel it and raise ``ClientGoneError`` when the client disconnects first.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Sends the byte frames of an async generator as they come."""

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncGenerator[bytes, None], on_close: Callable[[], None], ending: bytes = DONE
    ) -> None:
        """``frames`` yields one or several complete events at a time; ``on_close`` runs whatever happens.

        ``ending`` is sent last, also after an error.
        """
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._frames = frames
        self._on_close = on_close
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream, or stop as soon as the client is gone."""
        try:
            await unless_disconnected(receive, self._write(scope, send))
        except ClientGoneError:
            return
        finally:
            self._on_close()

    async def _write(self, scope: Scope, send: Send) -> None:
        send_body: Send = scope.get(SEND_BODY, send)
        num_bytes = 0
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for frame in self._frames:
                num_bytes += len(frame)
                await send_body({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            if not isinstance(error, (RequestError, EngineError)):
                logger.exception("A stream failed.")
            frame = sse(error_body(error))
            num_bytes += len(frame)
            await send_body({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            if send_body is not send:
                scope[STREAMED_BYTES] = num_bytes
            await self._frames.aclose()
        await send({"type": "http.response.body", "body": self._ending, "more_body": False})
