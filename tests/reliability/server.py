"""A real ``outrider serve`` process under test: its log, its children, and clients for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("OUTRIDER_SHARED", ROOT.parent / "shared"))
TINY = SHARED / "fixtures" / "llama4-tiny-a" / "bf16"
HOOKS = Path(__file__).with_name("hooks")

SMALL = ("--max-model-len", "512", "--num-gpu-blocks-override", "512", "--max-num-seqs", "16")
FULL = os.environ.get("OUTRIDER_RELIABILITY") == "full"
"""Whether the tests run at the size of the promises (hours) instead of that of an ordinary run (minutes)."""

LEAKS = re.compile(
    r"0x[0-9a-f]{4,}|Traceback|/(?!chat/completions)[a-z]+/[a-z_]+|[A-Z][A-Za-z]*(Exception|Error)\b(?<!RequestError)"
)


def scaled(ordinary: int, full: int) -> int:
    """How many repetitions this run makes."""
    return full if FULL else ordinary


def until(condition: Callable[[], Any], timeout_s: float, what: str = "the condition") -> float:
    """Wait for ``condition``; returns the seconds it took."""
    start = time.monotonic()
    while not condition():
        elapsed = time.monotonic() - start
        assert elapsed < timeout_s, f"{what} did not come about within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def children(pid: int) -> list[int]:
    """Processes started by ``pid`` that still run, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *children(int(child))]
    return found


def command_of(pid: int) -> str:
    """The command line of a process, empty when it is gone or a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class Server:
    """One server process; ``with`` ends it and everything it started."""

    def __init__(
        self,
        *flags: str,
        model: Path | str | None = TINY,
        env: dict[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        command = [sys.executable, "-m", "outrider", "serve", *([str(model)] if model else [])]
        command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", *flags]
        environment = {**os.environ, "PYTHONPATH": str(HOOKS), "OMP_NUM_THREADS": "1", **(env or {})}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self.url = ""
        self._pids: set[int] = set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.wait_for("Application startup complete.", 90)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            match = re.search(r"Starting outrider server on (http://\S+)", line)
            if match:
                self.url = match[1]

    @property
    def log(self) -> str:
        """Everything the server's processes have logged."""
        return "".join(self.lines)

    def wait_for(self, words: str, timeout_s: float, after: int = 0) -> None:
        """Wait until the log says ``words`` behind its first ``after`` lines."""
        until(
            lambda: words in "".join(self.lines[after:]) or self.process.poll() is not None,
            timeout_s,
            repr(words),
        )
        assert words in "".join(self.lines[after:]), self.log[-4000:]

    @property
    def engine_pid(self) -> int:
        """The engine process that runs now."""
        pids = [pid for pid in children(self.process.pid) if "outrider.engine.process" in command_of(pid)]
        self._pids.update(pids)
        assert len(pids) == 1, pids
        return pids[0]

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.url.rpartition(":")[2])

    def family(self) -> list[int]:
        """The server's process and all below it."""
        pids = [self.process.pid, *children(self.process.pid)]
        self._pids.update(pids)
        return pids

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        """GET on a connection of its own."""
        return httpx.get(self.url + path, timeout=kwargs.pop("timeout", 20), **kwargs)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """POST JSON on a connection of its own."""
        return httpx.post(self.url + path, json=body, timeout=kwargs.pop("timeout", 60), **kwargs)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        """A completion; greedy and of eight tokens unless told otherwise."""
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
        return self.post("/v1/completions", body)

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return dict(self.get("/server_info").json()["stats"])

    def metric(self, name: str) -> float:
        """The value of a metric with one time series."""
        match = re.search(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match, name
        return float(match[1])

    def wait_idle(self, timeout_s: float = 20) -> dict[str, Any]:
        """Wait until nothing runs and the ledger was found whole after that; returns the counters."""
        checks = self.stats()["ledger_checks"]
        busy_at_first = self.stats()["num_running"] > 0

        def idle() -> bool:
            stats = self.stats()
            is_checked = stats["ledger_checks"] > checks or not busy_at_first
            return not stats["num_running"] and not stats["num_waiting"] and is_checked

        until(idle, timeout_s, "an idle engine")
        stats = self.stats()
        assert stats["kv_blocks_used"] == 0, stats
        return stats

    def stop(self, timeout_s: float = 45) -> int:
        """SIGTERM, and the exit code."""
        self.family()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        pids = self.family()
        self.process.kill()
        self.process.wait()
        until(lambda: not any(is_running(pid) for pid in pids), 10, "the end of every process")
        self._reader.join(5)


def stream_events(response: httpx.Response) -> Iterator[Any]:
    """The JSON values of an event stream, and the word ``[DONE]`` at its end."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def read_stream(url: str, body: dict[str, Any], out: list[Any]) -> None:
    """Collect a streamed completion's events into ``out``; what breaks the connection is the last entry."""
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=90
        ) as response:
            out.append(response.status_code)
            if response.status_code != 200:
                out.append(json.loads(response.read()))
            else:
                out.extend(stream_events(response))
    except httpx.HTTPError as error:
        out.append(error)


def start_streams(url: str, count: int, **fields: Any) -> tuple[list[threading.Thread], list[list[Any]]]:
    """``count`` streams in threads, and where their events go."""
    outs: list[list[Any]] = [[] for _ in range(count)]
    threads = []
    for i, out in enumerate(outs):
        body = {"prompt": f"stream {i}", "max_tokens": 400, "temperature": 0, "ignore_eos": True, **fields}
        threads.append(threading.Thread(target=read_stream, args=(url, body, out), daemon=True))
        threads[-1].start()
    return threads, outs


def ended_well(out: list[Any]) -> bool:
    """Whether a stream was told how it ended: a finish reason or an error, then ``[DONE]``."""
    if len(out) >= 2 and out[0] != 200:
        return isinstance(out[1], dict) and "error" in out[1]
    if len(out) < 3 or out[-1] != "[DONE]":
        return False
    last = out[-2]
    return "error" in last or bool(last["choices"] and last["choices"][0]["finish_reason"])
