"""A server under hostile clients: every body, byte and image is answered or cut off, and the others notice nothing."""

from __future__ import annotations

import base64
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from outrider.server import call, middleware, protocol
from outrider.server.errors import MAX_ERROR_CHARS
from tests.reliability import hostile
from tests.reliability.server import LEAKS, Server, scaled

JSON = {"content-type": "application/json"}


def peak_mb(pid: int) -> float:
    """The most memory that the process ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def test_bodies_beyond_reason(server: Server) -> None:
    """Guards against a 500, a leak, a hang or a dead engine for JSON that no decoder or walker foresaw."""
    expected = server.complete([5, 6, 7]).json()["choices"]
    cases = list(hostile.bodies())
    assert len(cases) > 800
    with httpx.Client(base_url=server.url, timeout=60, headers=JSON) as client:
        for name, path, body in cases[:: scaled(5, 1)]:
            answer = client.post(path, content=body)
            assert answer.status_code in (200, 400, 404, 422), (name, answer.text[:300])
            if answer.status_code != 200:
                assert not LEAKS.search(answer.json()["error"]["message"]), (name, answer.text[:300])
                assert len(answer.json()["error"]["message"]) <= MAX_ERROR_CHARS + 1
    assert server.complete([5, 6, 7]).json()["choices"] == expected


def test_heavy_bodies_are_refused_before_they_are_decoded(server: Server) -> None:
    """Guards against one body of 10 MB that holds up everybody for ten seconds while it is decoded or walked."""
    before = peak_mb(server.process.pid)
    for name, path, body in hostile.heavy_bodies():
        assert len(body) < middleware.MAX_BODY_BYTES
        answer = httpx.post(server.url + path, content=body, headers=JSON, timeout=60)
        assert answer.status_code == 400, (name, answer.text[:300])
    assert peak_mb(server.process.pid) - before < 400


def test_structure_is_counted_as_json_has_it() -> None:
    """Guards against texts that are refused for the brackets and commas they contain, or that hide others' brackets."""
    prose = json.dumps({"prompt": 'He said: "[{,\\' * 200_000}).encode()
    assert len(prose) > protocol.CHECKED_FROM_BYTES
    with pytest.raises(
        protocol.RequestError, match="texts or lists"
    ):  # each quote counts, escaped ones do not
        protocol.decode_body(
            b'{"prompt":[' + b'"a",' * protocol.MAX_JSON_NODES + b'"a"]}', protocol.CompletionBody
        )
    assert protocol.decode_body(prose, protocol.CompletionBody).prompt == 'He said: "[{,\\' * 200_000
    hidden = b'{"prompt":"x\\\\","z":[' + b"[]," * (protocol.MAX_JSON_NODES + 1) + b"[]]}"
    with pytest.raises(protocol.RequestError, match="texts or lists"):
        protocol.decode_body(hidden, protocol.CompletionBody)
    ids = b'{"prompt":[' + b"5," * 1_000_000 + b"5]}"
    assert len(protocol.decode_body(ids, protocol.CompletionBody).prompt or "") == 1_000_001


@pytest.mark.parametrize("name", hostile.RAW)
def test_raw_bytes(server: Server, name: str) -> None:
    """Guards against bytes below HTTP that leave a traceback, an open door, or a server that does not answer others."""
    start = len(server.lines)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(hostile.RAW[name])
        sock.settimeout(10)
        answer = sock.recv(1 << 16)
    assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:200]
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:200]
    assert server.get("/livez").status_code == 200
    assert "Traceback" not in "".join(server.lines[start:])


def image_message(data: bytes, **fields: Any) -> dict[str, Any]:
    """A chat with one image."""
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}


def test_images_that_lie_or_unfold(server: Server) -> None:
    """Guards against decompression bombs: refused, or decoded within the memory that operations.md names."""
    before = peak_mb(server.process.pid)
    for name, data in hostile.images().items():
        start = time.monotonic()
        answer = server.post("/v1/chat/completions", image_message(data))
        assert answer.status_code == 422, (name, answer.text[:200])
        assert time.monotonic() - start < 10, name
    largest = server.post("/v1/chat/completions", image_message(hostile.png(7000, 7000)))
    assert largest.status_code == 200
    assert peak_mb(server.process.pid) - before < 450


def test_choices_multiply_within_a_bound(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a request of a few KB that makes the server hold gigabytes: every choice has its own prompt."""
    allowed = [5] * 200_000
    answer = server.complete([1, 2], n=8, temperature=1, allowed_token_ids=allowed, max_tokens=1)
    assert answer.status_code == 200, "an id counts once"
    limit = call.MAX_CHOICES_BYTES // (32 * protocol.MAX_N)
    prompt = [1] * (limit // 8)
    assert server.complete([prompt] * 8, n=protocol.MAX_N, temperature=1).status_code == 400


def test_bodies_are_held_within_a_bound() -> None:
    """Guards against a thousand clients with bodies of 30 MB each: what does not fit is told to come back."""
    import asyncio

    from outrider.errors import OverloadedError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await release.wait()

    async def one(messages: list[dict[str, Any]]) -> str:
        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: Any) -> None: ...

        try:
            await gate({"type": "http", "path": "/livez", "method": "POST", "headers": []}, receive, send)
        except OverloadedError as error:
            return f"{error.status} {error.retry_after_s:.0f}"
        return "served"

    def body() -> list[dict[str, Any]]:
        piece = {"type": "http.request", "body": bytes(middleware.MAX_BODY_BYTES // 2), "more_body": True}
        return [dict(piece), {**piece, "more_body": False}]

    async def run() -> tuple[list[str], list[str]]:
        fitting = middleware.MAX_HELD_BYTES // middleware.MAX_BODY_BYTES
        tasks = [asyncio.create_task(one(body())) for _ in range(fitting + 3)]
        await asyncio.sleep(0.1)
        release.set()
        first = await asyncio.gather(*tasks)
        return first, await asyncio.gather(*(one(body()) for _ in range(3)))

    release = asyncio.Event()
    gate = middleware.Gate(app, metrics=None, api_keys=[], send_request_id=False)  # type: ignore[arg-type]
    first, later = asyncio.run(run())
    assert first.count("503 5") == 3 and first.count("served") == len(first) - 3
    assert later == ["served"] * 3, "what has ended is no longer held"
