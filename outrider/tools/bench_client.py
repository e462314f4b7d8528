"""The benchmark's HTTP client: one streamed OpenAI request in, the arrival time of every chunk out.

Used by ``bench_load``; knows the wire (HTTP/1.1, SSE, the chunks' JSON), nothing of statistics or schedules.
It never repeats a request of which the server has answered a single byte.

Why not httpx or aiohttp: whatever the client spends on a chunk is charged to the latency it reports,
and it often shares its cores with the server. Here ``data_received`` stamps the bytes as the event loop reads
them, with no task switch between socket and clock; framing is left to ``httptools`` (the C parser of
uvicorn) and JSON to ``msgspec``. CPU a chunk, two cloud cores, 2026-11-23 (tests/tools/client_cost.py): 14 us
on uvloop, of which parsing is 1 us; httpx 76 us.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from outrider.errors import ConfigError

REQUEST_TIMEOUT_S = 6 * 3600.0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class RequestRecord:
    """What one request did. Times are ``time.perf_counter`` seconds.

    ``chunk_times`` holds the arrival of every SSE chunk with a non-empty ``choices`` list, whatever its text.
    ``prompt_tokens`` and ``output_tokens`` are the server's usage figures, None where it sent none.
    """

    start: float
    chunk_times: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""
    error: str | None = None

    @property
    def success(self) -> bool:
        """Whether the answer came to its end and held at least one chunk."""
        return self.error is None and len(self.chunk_times) > 0

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first chunk; 0 for a request that got none."""
        return self.chunk_times[0] - self.start if self.chunk_times else 0.0

    @property
    def itls_s(self) -> list[float]:
        """Gaps between consecutive chunks in seconds (a chunk may carry several tokens)."""
        times = self.chunk_times
        return [later - earlier for earlier, later in pairwise(times)]


class StreamRecorder:
    """Splits an SSE body into events and writes their times, text and usage into a ``RequestRecord``.

    An event of these servers is one ``data:`` line; comment lines and other fields are skipped.
    """

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self._rest = b""
        self._pieces: list[str] = []
        self._error: str | None = None

    def feed(self, data: bytes, now: float) -> None:
        """Take body bytes that arrived at ``now``; lines may be cut anywhere."""
        lines = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            return
        try:
            chunk = _decode_chunk(payload)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self._error = f"The server sent a chunk that is no OpenAI chunk ({error}): {payload[:200]!r}"
            return
        if chunk.error is not None:
            self._error = f"The server reported an error in the stream: {bytes(chunk.error).decode()[:500]}"
        if chunk.choices:
            self.record.chunk_times.append(now)
            choice = chunk.choices[0]
            text = choice.text if choice.delta is None else choice.delta.content
            if text:
                self._pieces.append(text)
        if chunk.usage is not None:
            self.record.prompt_tokens = chunk.usage.prompt_tokens
            self.record.output_tokens = chunk.usage.completion_tokens

    def finish(self) -> None:
        """The body has ended: settle text and error. A stream without chunks is an error."""
        self.record.text = "".join(self._pieces)
        self.record.error = self._error
        if self._error is None and not self.record.chunk_times:
            self.record.error = "The answer ended without a single chunk."


class _StaleConnection(Exception):
    """The server closed an idle connection before it answered a byte; a fresh one is safe to try."""


class _Connection(asyncio.Protocol):
    """One keep-alive connection carrying one exchange at a time; ``httptools`` calls the ``on_*`` methods."""

    def __init__(self) -> None:
        self.closed = False
        self.exchanges = 0
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[int] | None = None
        self._on_body: Callable[[bytes, float], None] | None = None
        self._error_body = b""
        self._now = 0.0
        self._answered = self._framed = False

    async def exchange(self, request: bytes, on_body: Callable[[bytes, float], None]) -> tuple[int, str]:
        """Send ``request``; a 200 body goes to ``on_body``. Returns (status, body of any other answer)."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._on_body, self._error_body = on_body, b""
        self._answered = self._framed = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            status = await self._done
        except BaseException:
            self.close()
            raise
        self.exchanges += 1
        return status, self._error_body.decode("utf-8", "replace")

    def close(self) -> None:
        """Close the socket; an exchange in flight fails."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"The server's answer is not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        if not self._answered and self.exchanges:
            self._fail(_StaleConnection())
        elif self._answered and not self._framed and exc is None:
            self._done.set_result(self._parser.get_status_code())  # an HTTP/1.0 body ends with the connection
        else:
            self._fail(ConnectionError(f"The server closed the connection in mid-answer ({exc or 'EOF'})."))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_body(self, body: bytes) -> None:
        assert self._on_body is not None
        if self._parser.get_status_code() == 200:
            self._on_body(body, self._now)
        elif len(self._error_body) < 4096:
            self._error_body += body

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class StreamClient:
    """A pool of keep-alive connections to one server; ``stream`` may run any number of times at once."""

    def __init__(self, base_url: str, headers: Mapping[str, str], *, insecure: bool = False) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                f"--base-url {base_url!r} must look like http://HOST:PORT or https://HOST:PORT."
            )
        self._host, self._prefix = url.hostname, url.path.rstrip("/")
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = _tls_context(insecure) if url.scheme == "https" else None
        self._headers = {"Host": url.netloc, "Content-Type": "application/json", **headers}
        self._idle: list[_Connection] = []

    async def stream(self, path: str, body: bytes, headers: Mapping[str, str]) -> RequestRecord:
        """POST ``body`` to ``path`` and record the streamed answer; failures are recorded, not raised."""
        request = self._head(path, len(body), headers) + body
        record = RequestRecord(start=time.perf_counter())
        recorder = StreamRecorder(record)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                status, message = await self._exchange(request, recorder.feed)
        except (OSError, TimeoutError) as error:
            recorder.finish()
            record.error = str(error) or type(error).__name__
            return record
        recorder.finish()
        if status != 200:
            record.error = f"HTTP {status}: {message[:500]}"
        return record

    def close(self) -> None:
        """Close every idle connection."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, feed: Callable[[bytes, float], None]) -> tuple[int, str]:
        while True:
            connection = await self._connect()
            try:
                answer = await connection.exchange(request, feed)
            except _StaleConnection:
                continue
            if not connection.closed:
                self._idle.append(connection)
            return answer

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection

    def _head(self, path: str, length: int, headers: Mapping[str, str]) -> bytes:
        fields = {**self._headers, **headers, "Content-Length": str(length)}
        lines = [
            f"POST {self._prefix}{path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _tls_context(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
