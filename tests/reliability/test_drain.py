"""SIGTERM: no new work, and every running stream is told how it ended."""

from __future__ import annotations

import signal
import time

import httpx
import pytest

from outrider.engine.client import SHUTTING_DOWN
from tests.reliability.server import SMALL, Server, ended_well, scaled, start_streams, until


def begin(server: Server, count: int, max_tokens: int) -> tuple[list, list]:
    """Streams that the server has accepted, not all of them running."""
    threads, outs = start_streams(server.url, count, max_tokens=max_tokens)
    until(lambda: all(outs), 30, "accepted streams")
    return threads, outs


def test_streams_end_with_an_event() -> None:
    """Guards against truncated streams: short ones finish, long ones get a last event at the deadline."""
    for _ in range(scaled(1, 10)):
        with Server(*SMALL, "--shutdown-timeout", "4") as server:
            short, short_outs = begin(server, 10, 6)
            long, long_outs = begin(server, 10, 480)
            server.process.send_signal(signal.SIGTERM)
            started = time.monotonic()

            def refuses(server: Server = server) -> bool:
                try:
                    httpx.get(server.url + "/livez", timeout=2)
                except httpx.TransportError:
                    return True
                return False

            until(refuses, 1, "a closed door")
            assert server.process.wait(20) == 0
            assert time.monotonic() - started < 4 + 6
            for thread in short + long:
                thread.join(5)
            assert all(ended_well(out) for out in short_outs + long_outs)
            errors = [out[-2]["error"] for out in long_outs if "error" in out[-2]]
            assert errors and all(e["message"] == SHUTTING_DOWN and e["code"] == 503 for e in errors)


def test_second_signal_is_fast() -> None:
    """Guards against an operator who has to wait, or to kill -9."""
    with Server(*SMALL, "--shutdown-timeout", "600") as server:
        threads, outs = begin(server, 8, 480)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Draining", 5)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 6
        for thread in threads:
            thread.join(5)
        assert all(ended_well(out) for out in outs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_server_ends_at_once(number: signal.Signals) -> None:
    """Guards against a shutdown that waits for nothing."""
    with Server(*SMALL) as server:
        started = time.monotonic()
        server.process.send_signal(number)
        server.process.wait(10)
        assert time.monotonic() - started < 6
