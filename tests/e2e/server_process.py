"""A real ``outrider serve`` for a test: own process, free port, ended with its test session.

with ServerProcess(["--max-num-seqs", "4"]) as server:
    server.post("/v1/completions", prompt="x")
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

REPO = Path(__file__).resolve().parents[2]
READY = "Application startup complete."
START_S = 120


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server; ``log`` holds every line it printed."""

    def __init__(
        self,
        argv: Sequence[str] = (),
        *,
        program: Sequence[str] = (),
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """``argv`` follows ``serve``; ``program`` replaces the whole command and must listen on ``port``."""
        self.port = free_port() if port is None else port
        self._env = dict(env or {})
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = list(program) or [sys.executable, "-m", "outrider", "serve", *argv, *address]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log: list[str] = []
        self._ready = threading.Event()

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(
            self._command,
            cwd=REPO,
            env={**os.environ, **self._env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S), f"not ready in {START_S} s:\n{''.join(self.log)}"
        assert self._process.poll() is None, f"the server ended:\n{''.join(self.log)}"
        self.http = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "http"):
            self.http.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log.append(line)
            if READY in line:
                self._ready.set()
        self._ready.set()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The first choice of ``/v1/completions``, with its token ids; the call must succeed."""
        answer = self.post("/v1/completions", **{"return_token_ids": True, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["choices"][0])

    def metric(self, name: str) -> float:
        """The value of one ``vllm:`` gauge or counter."""
        page = self.http.get("/metrics").text
        match = re.search(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", page, re.M)
        assert match, f"no metric {name}"
        return float(match[1])

    def until_idle(self, seconds: float) -> None:
        """Wait until no request runs and no KV block is held; fails after ``seconds``."""
        deadline = time.monotonic() + seconds
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(values := [self.metric(name) for name in names]):
            assert time.monotonic() < deadline, dict(zip(names, values, strict=True))
            time.sleep(0.02)
