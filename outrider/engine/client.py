"""The front end's handle on the engine process: starts it, talks to it, notices its death, starts it again.

Implements ``engine.protocol.EngineClient`` on one asyncio loop. Called by the server. Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

from outrider.config import EngineConfig
from outrider.engine.messages import (
    Abort,
    Add,
    Events,
    FrameReader,
    FromEngine,
    Progress,
    Ready,
    Refused,
    ResetPrefixCache,
    Stop,
    encode_frame,
)
from outrider.engine.protocol import Health
from outrider.errors import ConfigError, EngineDeadError, EngineError
from outrider.types import FINISH_ERROR, EngineInfo, EngineStats, Request, TokenEvent

STALL_S = 8.0
"""Silence after which the engine counts as stalled; it speaks at least once a second when healthy."""

ProgressCallback = Callable[[str, int, int], None]

ENGINE_GONE = "The engine stopped while it worked on this request; send it again."

logger = logging.getLogger("outrider.engine")


class EventStream:
    """The events of one request; what arrives while the consumer is away is merged into one event."""

    def __init__(self, client: ProcessEngineClient, request_id: str) -> None:
        self._client = client
        self._request_id = request_id
        self._pending: TokenEvent | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, event: TokenEvent) -> None:
        """Add an event; wakes the consumer."""
        self._pending = event if self._pending is None else _merged(self._pending, event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        while self._pending is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event, self._pending = self._pending, None
        if event.finish_reason is not None:
            self._ended = True
        return event

    async def aclose(self) -> None:
        """Give up on the rest; the engine frees the request's blocks."""
        self._ended = True
        self._client.abort(self._request_id)


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
    )


class ProcessEngineClient:
    """One engine process and the requests it works on."""

    def __init__(self, config: EngineConfig, on_progress: ProgressCallback | None = None) -> None:
        self._config = config
        self._on_progress = on_progress
        self._streams: dict[str, EventStream] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_message_s = 0.0
        self._last_step_s = time.monotonic()
        self._engine_has_work = False
        self._ready = False
        self._closing = False
        self._stall_reported = False
        self.num_restarts = 0
        self.num_stalls = 0
        self.stats = EngineStats()
        self.info: EngineInfo

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and wait until it is ready; ``ConfigError`` or ``EngineError`` if it refuses."""
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the process; running requests get a final error event."""
        self._closing = True
        self._send(Stop())
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_process(grace_s=3.0)
        self._fail_all(ENGINE_GONE)

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "outrider.engine.process", str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        self._frames = FrameReader(FromEngine)
        self._writer.write(encode_frame(self._config))
        while not self._ready:
            for message in await self._read():
                self._handle(message)

    async def _read(self) -> list[object]:
        assert self._reader is not None
        data = await self._reader.read(1 << 20)
        if not data:
            raise EngineDeadError("The engine process ended; the log above says why.")
        self._last_message_s = time.monotonic()
        return self._frames.feed(data)

    async def _supervise(self) -> None:
        """Read events for ever; when the process dies, tell its clients and start another."""
        watchdog = asyncio.create_task(self._watch())
        try:
            while True:
                try:
                    while True:
                        for message in await self._read():
                            self._handle(message)
                except (EngineDeadError, OSError, ValueError) as error:
                    await self._recover(error)
        finally:
            watchdog.cancel()

    async def _recover(self, error: Exception) -> None:
        logger.error("The engine process ended (%s); starting it again.", error)
        self._ready = False
        self._fail_all(ENGINE_GONE)
        delay = 0.5
        while not self._closing:
            await self._end_process(grace_s=0.0)
            try:
                await self._launch()
                self.num_restarts += 1
                return
            except (EngineError, ConfigError, OSError) as failure:
                logger.error("The engine could not be started again: %s", failure)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 30.0)

    async def _end_process(self, grace_s: float) -> None:
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + grace_s
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if process.poll() is None:
            process.kill()
        await asyncio.to_thread(process.wait)
        if self._writer is not None:
            self._writer.close()

    async def _watch(self) -> None:
        """Notice a stall: log every thread's stack once per stall, and count it."""
        while True:
            await asyncio.sleep(1.0)
            stalled = self._ready and time.monotonic() - self._last_message_s > STALL_S
            if stalled and not self._stall_reported and self._process is not None:
                self.num_stalls += 1
                logger.error("The engine has been silent for %.0f s; its stacks follow.", STALL_S)
                self._process.send_signal(signal.SIGUSR1)
            self._stall_reported = stalled

    # -- messages ------------------------------------------------------------------------------------

    def _handle(self, message: object) -> None:
        match message:
            case Events(events, stats, has_work):
                if stats.steps != self.stats.steps or not has_work:
                    self._last_step_s = time.monotonic()
                self.stats = stats
                self._engine_has_work = has_work
                for event in events:
                    self._deliver(event)
            case Progress(stage, done, total):
                if self._on_progress is not None:
                    self._on_progress(stage, done, total)
            case Ready(info):
                self.info = info
                self._ready = True
            case Refused(text, is_config):
                raise ConfigError(text) if is_config else EngineError(text)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # aborted by its client
        if event.finish_reason is not None:
            del self._streams[event.request_id]
        stream.put(event)

    def _fail_all(self, error: str) -> None:
        for request_id in list(self._streams):
            self._deliver(TokenEvent(request_id, [], FINISH_ERROR, error=error))

    def _send(self, message: object) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    # -- EngineClient --------------------------------------------------------------------------------

    def submit(self, request: Request) -> EventStream:
        """Hand over a request; see ``EngineClient.submit``."""
        if not self._ready:
            raise EngineDeadError("The engine is starting; try again in a few seconds.")
        stream = EventStream(self, request.request_id)
        self._streams[request.request_id] = stream
        self._send(Add(request))
        return stream

    def abort(self, request_id: str) -> None:
        """Stop working on a request; see ``EngineClient.abort``."""
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort([request_id]))

    def health(self) -> Health:
        """Whether the process lives, and whether its steps move while there is work."""
        now = time.monotonic()
        age = now - self._last_step_s if self._engine_has_work else 0.0
        if self._process is None or self._process.poll() is not None or not self._ready:
            return Health(False, False, "The engine process is not running.", age)
        if now - self._last_message_s > STALL_S:
            return Health(
                False, True, f"The engine has been silent for {now - self._last_message_s:.0f} s.", age
            )
        return Health(True, True, "", age)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prompt beginnings; blocks in use are kept by their requests."""
        self._send(ResetPrefixCache())
        return True
