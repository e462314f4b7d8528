"""Every resource that a client can ask for has a bound, and hitting it costs the client alone."""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from outrider.cli import http_protocol
from outrider.engine.backlog import FIRST_GUESS, QUEUE_S, Backlog
from outrider.engine.client import EXPIRED
from outrider.errors import OverloadedError
from tests.reliability.server import SMALL, Server, scaled, start_streams, until

LIMITS = ("--max-num-seqs", "4", "--max-num-queued-tokens", "200", "--request-timeout", "25")


@pytest.fixture(scope="module")
def bounded() -> Iterator[Server]:
    """A server with room for four requests and a short queue."""
    with Server(*SMALL, *LIMITS) as server:
        yield server
        server.wait_idle(60)


def test_queue_is_bounded_and_refusals_are_quick(bounded: Server) -> None:
    """Guards against a queue without end, slow refusals, and refusals that do not say when to come back."""
    server = bounded
    before = server.metric("process_resident_memory_bytes")
    prompt = list(range(10, 60))
    threads, outs = start_streams(server.url, 4, prompt=prompt, max_tokens=100)
    until(lambda: all(len(out) > 1 for out in outs), 20, "four running")
    waiting, waiting_outs = start_streams(server.url, 4, prompt=prompt, max_tokens=8)
    until(lambda: all(waiting_outs), 20, "four waiting")
    times = []
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for _ in range(scaled(40, 1000)):
            start = time.perf_counter()
            answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8})
            times.append(time.perf_counter() - start)
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert statistics.median(times) < 0.05
    for thread in threads + waiting:
        thread.join(60)
    assert all(out[0] == 200 and out[-1] == "[DONE]" for out in outs + waiting_outs), "the queue is served"
    assert server.metric("process_resident_memory_bytes") - before < 50e6


def test_overload_does_not_slow_the_accepted(bounded: Server) -> None:
    """Guards against a server that takes everything and answers nobody: ten times the clients, the same wait."""

    async def worker(client: httpx.AsyncClient, end: float, ttfts: list[float]) -> None:
        body = {"prompt": list(range(10, 60)), "max_tokens": 10, "stream": True, "ignore_eos": True}
        while time.monotonic() < end:
            start = time.monotonic()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 503:
                    await asyncio.sleep(float(response.headers["Retry-After"]))
                    continue
                is_first = True
                async for line in response.aiter_lines():
                    if is_first and line:
                        ttfts.append(time.monotonic() - start)
                        is_first = False

    async def load(clients: int, seconds: float) -> list[float]:
        ttfts: list[float] = []
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=bounded.url, timeout=60, limits=limits) as client:
            end = time.monotonic() + seconds
            await asyncio.gather(*(worker(client, end, ttfts) for _ in range(clients)))
        return sorted(ttfts)

    seconds = scaled(6, 600)
    at_one = asyncio.run(load(8, seconds))  # four running, four waiting: saturation
    before = bounded.metric("process_resident_memory_bytes")
    at_ten = asyncio.run(load(80, seconds))
    assert bounded.metric("process_resident_memory_bytes") - before < 50e6
    assert len(at_ten) > len(at_one) / 2, "throughput survives"
    p99_one, p99_ten = (values[int(len(values) * 0.99) - 1] for values in (at_one, at_ten))
    assert p99_ten < 2 * p99_one + 0.5, (p99_one, p99_ten)


def test_requests_have_a_deadline(bounded: Server) -> None:
    """Guards against requests that live for ever: the rest of a long queue ends at --request-timeout."""
    threads, outs = start_streams(bounded.url, 8, max_tokens=490, prompt=[11, 12, 13])
    for thread in threads:
        thread.join(60)
    texts = [out[-2]["error"] for out in outs if "error" in out[-2]]
    if not texts:
        pytest.skip("this machine finished 8 x 490 tokens in 25 s")
    assert all(error["message"] == EXPIRED.format(25) and error["code"] == 504 for error in texts)


def raw_stream(server: Server, fields: str) -> socket.socket:
    """A streamed completion on a raw socket whose client reads nothing."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = '{"prompt": "x", "stream": true, "ignore_eos": true, ' + fields + "}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sock.sendall(f"{head}\r\n\r\n{body}".encode())
    return sock


@pytest.mark.parametrize("choices", [1, 2])
def test_slow_reader_loses_its_stream(choices: int) -> None:
    """Guards against a client that never reads and makes the server keep its whole answer in memory."""
    flags = ("--max-model-len", "4096", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "200M")
    with Server(*flags) as server:
        fields = f'"logprobs": 20, "n": {choices}, "temperature": 1, "max_tokens": 4000'
        with raw_stream(server, fields):
            until(lambda: server.stats()["num_running"] > 0, 20, "the stream")
            until(lambda: server.stats()["num_running"] == 0, 80, "its end")
            assert server.stats()["generation_tokens"] < choices * 4000, "it ended before it was complete"
        server.wait_idle()
        assert server.complete().status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /" + "a" * (http_protocol.MAX_URL_BYTES + 1) + " HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        ("GET /livez HTTP/1.1\r\nHost: x\r\nX-A: " + "a" * http_protocol.MAX_HEADER_BYTES + "\r\n\r\n", 431),
        ("GET /livez HTTP/1.1\r\n" + "X-A: b\r\n" * (http_protocol.MAX_HEADERS + 1) + "\r\n", 431),
        ("GET /livez HTTP/1.1\r\nHost: x\r\nbroken\r\n\r\n", 400),
        ("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 413),
    ],
    ids=["url", "headers", "many headers", "malformed", "body"],
)
def test_heads_are_bounded(server: Server, head: str, status: int) -> None:
    """Guards against memory spent on a client before it is known."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(f"HTTP/1.1 {status} ".encode())


def test_bodies_are_bounded_without_a_length(server: Server) -> None:
    """Guards against a chunked body that never ends."""

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * (1 << 20)

    with pytest.raises((httpx.HTTPStatusError, httpx.WriteError, httpx.ReadError)):
        answer = httpx.post(
            server.url + "/v1/completions",
            content=endless(),
            headers={"content-type": "application/json"},
            timeout=30,
        )
        assert answer.status_code == 413
        answer.raise_for_status()


def test_slow_loris_is_cut_off(server: Server) -> None:
    """Guards against connections held open by one byte at a time, in the headers and in the body."""
    header = socket.create_connection(("127.0.0.1", server.port))
    silent = socket.create_connection(("127.0.0.1", server.port))
    header.sendall(b"GET /livez HTTP/1.1\r\n")
    start = time.monotonic()
    for sock in (header, silent):
        sock.settimeout(http_protocol.HEADER_S + 5)
    while time.monotonic() - start < http_protocol.HEADER_S - 2:
        time.sleep(0.5)
        header.sendall(b"x")
    for sock in (header, silent):
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ") and sock.recv(1) == b""
        sock.close()
    assert time.monotonic() - start < http_protocol.HEADER_S + 3


SLOW_BODY_SERVER = """
import asyncio
from outrider.cli import http_protocol
from outrider.cli.http_server import run_http
from outrider.cli.sockets import bind
from outrider.config import ServerConfig

http_protocol.BODY_S = 1.0

async def app(scope, receive, send):
    if scope["type"] == "http":
        while (message := await receive())["type"] != "http.disconnect":
            pass
        print("disconnected", flush=True)

async def end():
    pass

async def main():
    sock = bind(ServerConfig(host="127.0.0.1", port=0))
    print(sock.getsockname()[1], flush=True)
    await run_http(app, ServerConfig(), sock, end)

asyncio.run(main())
"""


def test_slow_bodies_are_cut_off() -> None:
    """Guards against a body that trickles: each KiB buys a second, and no byte more than that."""
    command = [sys.executable, "-c", SLOW_BODY_SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        try:
            port = int(child.stdout.readline())
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 20, "the server")
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                start = time.monotonic()
                sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + b"x" * 1024)
                assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")
                assert 1.5 < time.monotonic() - start < 4
            assert child.stdout.readline() == "disconnected\n"
        finally:
            child.kill()


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_backlog_follows_the_measured_rate() -> None:
    """Guards against a bound that is only a number: it is ten seconds of the prefill rate, once that is known."""
    clock = Clock()
    backlog = Backlog(None, clock)
    assert backlog.limit == FIRST_GUESS * QUEUE_S
    backlog.add("a", 5000)
    for second in range(10):
        clock.now = second
        backlog.observe(second * 700)
    assert backlog.limit == pytest.approx(7000, rel=0.01)
    backlog.check(2000, 8, 8)
    backlog.check(10**6, 7, 8)  # fewer than can run at once: never refused
    with pytest.raises(OverloadedError) as refused:
        backlog.check(2000 + 1400, 8, 8)
    assert refused.value.retry_after_s == 2
    backlog.remove("a")
    backlog.remove("a")
    assert backlog.num_tokens == 0
    backlog.check(10**6, 8, 8)  # nobody waits: it would be next
