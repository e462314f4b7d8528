"""Probes tell the truth: ready means that steps move while there is work."""

from __future__ import annotations

import os
import signal
import time

import httpx

from outrider.engine.liveness import STALL_S, Liveness
from tests.reliability.server import SMALL, Server, start_streams, until


def test_probes_of_a_healthy_server(server: Server) -> None:
    """Guards against a probe without a reason, and one that is not ready while it serves."""
    for path in ("/livez", "/readyz", "/health", "/ping"):
        answer = server.get(path)
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok" and answer.json()["reason"] == ""


def assert_noticed(server: Server, since: float) -> None:
    """Not ready within 10 s of ``since``, alive all the same, with a reason, a metric and a line in the log."""
    until(lambda: server.get("/readyz").status_code == 503, 10 - (time.monotonic() - since), "not ready")
    for path in ("/readyz", "/health"):
        body = server.get(path).json()
        assert body["status"] == "unavailable" and "not moved" in body["reason"], body
    assert server.get("/livez").status_code == 200
    until(lambda: server.metric("engine_stalled_total") == 1, 2, "the metric")


def test_stalls_are_noticed_and_end() -> None:
    """Guards against an engine that hangs behind a healthy probe: the loop stuck in a call, the process stopped."""
    with Server(*SMALL, env={"FAULT_PAUSE_S": "13"}) as server:
        threads, outs = start_streams(server.url, 4, max_tokens=100)
        until(lambda: all(len(out) > 3 for out in outs), 20, "the first tokens")
        stuck = time.monotonic()
        os.kill(server.engine_pid, signal.SIGUSR2)
        assert_noticed(server, stuck)
        server.wait_for(
            "Thread 0x", 3
        )  # faulthandler's stacks: the other threads, then the one that is stuck
        server.wait_for("in pause", 3)
        assert "in _run" in server.log, "the stack of the outbox thread"
        until(lambda: server.get("/readyz").status_code == 200, 15, "ready again")
        for thread in threads:
            thread.join(60)
        assert all(out[-1] == "[DONE]" and "error" not in out[-2] for out in outs), "the streams go on"

        os.kill(server.engine_pid, signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: server.get("/readyz").status_code == 503, 10, "not ready")
        assert time.monotonic() - stopped < 10
        server.wait_for("T (stopped)", 3)
        assert server.metric("engine_stalled_total") == 2
        os.kill(server.engine_pid, signal.SIGCONT)
        until(lambda: server.get("/readyz").status_code == 200, 5, "ready again")
        assert server.complete().status_code == 200
        assert server.metric("engine_restarts_total") == 0


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_false_alarm() -> None:
    """Guards against alarms for idleness, for the first step after idleness, and for our own pauses."""
    clock = Clock()
    live = Liveness(clock)
    live.restart()
    for second in range(1, 100):  # idle for long: heartbeats only
        clock.now = second
        live.message(5, False)
        live.tick()
        assert live.stalled_s == 0
    clock.now = 99.5
    live.message(5, True)  # work arrives; the counter has not moved for long, and that is no stall
    for _ in range(int(STALL_S) - 1):  # a long first step
        clock.now += 1
        live.tick()
    assert live.stalled_s == 0 and live.step_age_s == STALL_S - 1
    live.message(6, True)
    clock.now += 60  # this process was suspended: it heard nothing because it did not listen
    live.tick()
    assert live.stalled_s == 0
    for _ in range(12):  # messages without a step
        clock.now += 1
        live.message(6, True)
        live.tick()
    assert live.stalled_s > STALL_S


def test_answers_stay_ready_under_load(server: Server) -> None:
    """Guards against a probe that fails because the server is busy; the long version is ``benchmarks/soak.py``."""
    threads, _ = start_streams(server.url, 20, max_tokens=24)
    with httpx.Client() as client:
        while any(thread.is_alive() for thread in threads):
            assert client.get(server.url + "/readyz", timeout=10).status_code == 200
            time.sleep(0.1)
    assert server.metric("engine_stalled_total") == 0
