"""``outrider serve`` as a process: what it says, when it answers, how it ends."""

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
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from outrider.cli.http_server import uvicorn_config
from outrider.cli.stats_line import log_stats
from outrider.config import ServerConfig
from outrider.types import EngineStats

# An application without an engine: one stream that ends by itself after some seconds, or when it is told to.
FAKE = """
import asyncio, sys
from outrider.cli.http_server import run_http
from outrider.cli.sockets import bind
from outrider.config import ServerConfig
from outrider.logs import setup_logging

ended = None

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun;", "more_body": True})
    try:
        await asyncio.wait_for(ended.wait(), float(scope["path"].strip("/")))
        last = b"told to end"
    except TimeoutError:
        last = b"done"
    await send({"type": "http.response.body", "body": last})

async def main():
    global ended
    ended = asyncio.Event()
    async def end():
        ended.set()
    config = ServerConfig(host="127.0.0.1", port=int(sys.argv[1]), shutdown_timeout=float(sys.argv[2]))
    await run_http(app, config, bind(config), end)

setup_logging("Fake")
asyncio.run(main())
print("ended cleanly")
"""


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A child with piped output that does not outlive the test."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def read_until(child: subprocess.Popen[str], words: str) -> list[str]:
    """The lines of the child's log up to the one with ``words``."""
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"{words!r} never came:\n{''.join(lines)}")


@pytest.mark.parametrize(
    ("request_s", "drain_s", "signals", "answer"),
    [("1", "20", 1, "begun;done"), ("60", "1", 1, "begun;told to end"), ("60", "60", 2, "begun;told to end")],
    ids=["finishes in time", "deadline", "second signal"],
)
def test_drain(request_s: str, drain_s: str, signals: int, answer: str) -> None:
    """Guards against cut streams: a request ends by itself, or is told at the deadline or a second signal."""
    port = free_port()
    with process(sys.executable, "-c", FAKE, str(port), drain_s) as child:
        read_until(child, "Application startup complete.")
        started = time.monotonic()
        with httpx.stream("GET", f"http://127.0.0.1:{port}/{request_s}", timeout=30) as response:
            parts = response.iter_text()
            text = next(parts)
            for words in ("Draining", "Ending the requests")[:signals]:
                child.send_signal(signal.SIGTERM)
                read_until(child, words)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://127.0.0.1:{port}/0", timeout=5)
            text += "".join(parts)
        assert text == answer
        out, _ = child.communicate(timeout=20)
        assert "ended cleanly" in out and child.returncode == 0
        assert time.monotonic() - started < 15


def test_settings_reach_uvicorn() -> None:
    """Guards against flags that are parsed and then forgotten."""
    config = uvicorn_config(
        None,
        ServerConfig(
            root_path="/v", disable_uvicorn_access_log=True, shutdown_timeout=7, uvicorn_log_level="warning"
        ),
    )
    assert (config.root_path, config.access_log) == ("/v", False)
    assert config.timeout_graceful_shutdown is not None and config.timeout_graceful_shutdown > 7
    assert logging.getLogger("uvicorn").level == logging.WARNING


def test_silent_paths_of_the_access_log() -> None:
    """Guards against probes that fill the log, and against a filter that drops everything."""
    uvicorn_config(None, ServerConfig(disable_access_log_for_endpoints="/health, /metrics"))
    access = logging.getLogger("uvicorn.access")

    def passes(path: str) -> bool:
        args = ("1.2.3.4:5", "GET", path, "1.1", 200)
        return bool(
            access.filter(logging.LogRecord("uvicorn.access", 20, "", 0, "%s %s %s %s %s", args, None))
        )

    try:
        assert [passes(p) for p in ("/health", "/metrics?x=1", "/v1/models")] == [False, False, True]
    finally:
        access.filters.clear()


def test_statistics_only_while_there_is_work(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a line every ten seconds from an idle server, and against none from a busy one."""
    snapshots = [EngineStats()]

    async def scenario() -> None:
        task = asyncio.create_task(log_stats(lambda: snapshots[-1], interval_s=0.05))
        await asyncio.sleep(0.2)
        assert not caplog.records
        snapshots.append(EngineStats(steps=5, generation_tokens=5))
        await asyncio.sleep(0.2)
        task.cancel()

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert len(caplog.records) == 1 and "Avg generation throughput" in caplog.text


def test_statistics_after_a_new_engine(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against negative rates in the first line after an engine process was started again."""
    snapshots = [EngineStats(steps=90, prompt_tokens=700, generation_tokens=80)]

    async def scenario() -> None:
        task = asyncio.create_task(log_stats(lambda: snapshots[-1], interval_s=0.05))
        await asyncio.sleep(0.02)
        snapshots.append(EngineStats(steps=2, prompt_tokens=7, generation_tokens=2))
        await asyncio.sleep(0.2)
        task.cancel()

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    assert len(caplog.records) == 1 and "throughput: -" not in caplog.text


def children(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_embedded_model_from_launch_to_end() -> None:
    """Guards the whole life: refused until ready, the line when ready, an answer, an end without orphans."""
    port = free_port()
    command = [sys.executable, "-m", "outrider", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with process(*command, "--max-num-seqs", "4", "--served-model-name", "tiny") as child:
        read_until(child, "non-default args: {'host': '127.0.0.1'")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
        lines = read_until(child, "Application startup complete.")
        assert any(f"http://127.0.0.1:{port}" in line for line in lines)
        assert any("KV cache" in line and "tokens" in line for line in lines)
        (engine,) = children(child.pid)
        body = {"model": "tiny", "prompt": "San Francisco is a", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
        assert child.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
