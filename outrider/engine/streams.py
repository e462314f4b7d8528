"""The events of one request between the engine's socket and the handler that reads them.

Made by ``client``. A reader that is away finds what it missed merged into one event; a reader that stays away while
more than ``MAX_BUFFERED_BYTES`` pile up loses the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from outrider.types import TokenEvent, TokenLogprobs

MAX_BUFFERED_BYTES = 1 << 20

_TOKEN_BYTES = 32
_LOGPROB_BYTES = 128
_ALTERNATIVE_BYTES = 64


class EventStream:
    """An async iterator of ``TokenEvent``; ``on_close`` is called when the reader gives up."""

    def __init__(self, on_close: Callable[[], None], expires_s: float) -> None:
        """``expires_s`` is the time by the monotonic clock at which the client ends the request."""
        self.expires_s = expires_s
        self._on_close = on_close
        self._pending: TokenEvent | None = None
        self._num_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, event: TokenEvent) -> bool:
        """Add an event and wake the reader; False when what piled up behind the first unread one is over the bound."""
        if self._pending is None:
            self._pending = event
        else:
            self._pending = _merged(self._pending, event)
            self._num_bytes += _size(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return self._num_bytes <= MAX_BUFFERED_BYTES

    def replace(self, event: TokenEvent) -> None:
        """Drop what was not read; ``event`` is the last one."""
        self._pending, self._num_bytes = None, 0
        self.put(event)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        while self._pending is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event, self._pending, self._num_bytes = self._pending, None, 0
        if event.finish_reason is not None:
            self._ended = True
        return event

    async def aclose(self) -> None:
        """Give up on the rest; the engine frees the request's blocks."""
        self._ended = True
        self._on_close()


def _size(event: TokenEvent) -> int:
    """Memory that an unread event holds, roughly, in bytes."""
    entries: list[TokenLogprobs | None] = [*(event.logprobs or []), *(event.prompt_logprobs or [])]
    alternatives = sum(len(entry.top_ids) for entry in entries if entry is not None)
    return (
        len(event.token_ids) * _TOKEN_BYTES
        + len(entries) * _LOGPROB_BYTES
        + alternatives * _ALTERNATIVE_BYTES
    )


def _merged(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return TokenEvent(
        first.request_id,
        first.token_ids + second.token_ids,
        second.finish_reason,
        second.stop_reason,
        logprobs,
        first.prompt_logprobs or second.prompt_logprobs,
        first.num_cached_tokens or second.num_cached_tokens,
        second.error,
        second.error_status,
        first.queue_s or second.queue_s,
    )
