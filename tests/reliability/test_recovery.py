"""What ends by force: the engine comes back by itself, and nothing outlives the front end."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from outrider.engine.client import ENGINE_GONE, ENGINE_STARTING
from tests.reliability.server import SMALL, Server, ended_well, is_running, scaled, start_streams, until

EMBEDDED = ("--max-model-len", "512", "--num-gpu-blocks-override", "512")


@pytest.mark.parametrize("tp", [1, 2])
def test_killed_engine_comes_back(tp: int) -> None:
    """Guards against clients that hang, a server that stays dead, and ranks left behind, when the engine is killed."""
    flags = (*SMALL, "--tensor-parallel-size", str(tp))
    with Server(*flags) as server:
        expected = server.complete().json()["choices"]
        for count in range(1, scaled(2 if tp == 1 else 1, 20) + 1):
            threads, outs = start_streams(server.url, 3)
            until(lambda outs=outs: all(len(out) > 2 for out in outs), 30, "the first tokens")
            victims = [pid for pid in server.family() if pid != server.process.pid]
            assert len(victims) >= (1 if tp == 1 else 3)
            os.kill(server.engine_pid, signal.SIGKILL)
            killed = time.monotonic()
            for thread in threads:
                thread.join(2)
            assert time.monotonic() - killed < 2, "every client hears of it within 2 s"
            for out in outs:
                assert ended_well(out) and out[-2]["error"]["message"] == ENGINE_GONE, out[-2:]
            refused = server.complete()
            assert refused.status_code == 503 and refused.json()["error"]["message"] == ENGINE_STARTING
            assert int(refused.headers["Retry-After"]) > 0
            assert server.get("/readyz").status_code == 503 and server.get("/livez").status_code == 200
            until(
                lambda victims=victims: not any(map(is_running, victims)), 3, "the end of the old processes"
            )
            until(lambda: server.get("/readyz").status_code == 200, 60, "a new engine")
            assert server.complete().json()["choices"] == expected
            assert server.metric("engine_restarts_total") == count
        assert len(server.family()) == 1 + (1 if tp == 1 else 3)


def test_killed_engine_of_the_embedded_model() -> None:
    """Guards against a promise that only the tiny model keeps: serving again within 60 s."""
    with Server(*EMBEDDED, model=None) as server:
        os.kill(server.engine_pid, signal.SIGKILL)
        until(lambda: server.get("/readyz").status_code == 503, 2, "not ready")
        until(lambda: server.get("/readyz").status_code == 200, 60, "a new engine")
        assert server.complete("The capital of France is", max_tokens=4).status_code == 200


@pytest.mark.parametrize("tp", [1, 2])
def test_killed_front_end_leaves_nothing(tp: int) -> None:
    """Guards against orphans that hold memory or the port after the front end is killed, idle and at work."""
    for round_ in range(scaled(1, 20)):
        with Server(*SMALL, "--tensor-parallel-size", str(tp)) as server:
            if round_ % 2 == 0:
                start_streams(server.url, 2)
                until(lambda server=server: server.stats()["num_running"] > 0, 20, "work")
            pids, url = server.family(), server.url
            assert len(pids) == (2 if tp == 1 else 4)
            os.kill(server.process.pid, signal.SIGKILL)
            until(lambda pids=pids: not any(map(is_running, pids)), 3, "the end of every process")
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/livez")


def test_killed_during_start_leaves_nothing() -> None:
    """Guards against an engine that loads on after its front end is gone."""
    with Server(*SMALL, wait=False) as server:
        until(lambda: len(server.family()) == 2, 30, "the engine process")
        time.sleep(0.5)
        pids = server.family()
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: not any(map(is_running, pids)), 3, "the end of every process")
