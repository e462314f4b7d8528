"""A long mixed load on a real server: does memory grow, do probes lie, does anything fail that should not?

    python -m benchmarks.soak [--minutes 30] [--model FOLDER] [--clients 16] [-- SERVE FLAGS]

Completions, chats and responses, streamed and whole, several choices, grammars, tools, disconnects, wrong requests
and prefix hits, all at once. Samples the memory of every process and the probes once a second. Writes
``benchmarks/results/soak.html`` (the plot) and ``soak.json``; exits 1 when memory grows faster than ``MAX_SLOPE_MB``
an hour after warm-up, when a probe fails, when the engine is restarted, or when an answer is a 500
or does not come.

On a CPU the KV cache becomes resident as it fills, so by default it is small enough (``SERVE_FLAGS``) to be full
long before the warm-up ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.record import about, as_typed, end_with
from benchmarks.record import write as write_json
from outrider.tools.plots import Series, line_plot, page, table

RESULTS = Path(__file__).parent / "results"
MAX_SLOPE_MB = 5.0
ANSWER_S = 300
WARM_UP_SHARE = 0.25
"""The first part of the run, in which pools and caches fill, does not count for the slope."""

SERVE_FLAGS = ("--kv-cache-memory-bytes", "256M", "--max-model-len", "2048")
GPU_QUERY = (
    shutil.which("nvidia-smi"),
    "--query-compute-apps=pid,used_memory",
    "--format=csv,noheader,nounits",
)
SYSTEM = "You answer in one short sentence, and you never guess. " * 6
WORDS = ("sea", "train", "bread", "moon", "proof", "engine")


class Server:
    """The process under load and the URL that its log names."""

    def __init__(self, model: str | None, flags: list[str]) -> None:
        command = [sys.executable, "-m", "outrider", "serve", *([model] if model else [])]
        command += ["--host", "127.0.0.1", "--port", "0", "--disable-uvicorn-access-log", *flags]
        self.command = as_typed(command)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.url = ""
        for line in self.process.stderr:
            sys.stderr.write(line)
            if match := re.search(r"Starting outrider server on (http://\S+)", line):
                self.url = match[1]
            if "Application startup complete." in line:
                break
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "ERROR" in line:
                sys.stderr.write(line)

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of the front end and of everything below it, and their GPU memory if any, in MB."""
        below = _children(self.process.pid)
        sizes = {"front end": _resident_mb(self.process.pid), "engine": sum(map(_resident_mb, below))}
        if GPU_QUERY[0] is not None:
            sizes["gpu"] = _gpu_mb(set(below))
        return sizes


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def _gpu_mb(pids: set[int]) -> float:
    """GPU memory that the driver counts for these processes; in a container it may count for none."""
    command = [str(part) for part in GPU_QUERY]
    rows = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    used = [row.split(",") for row in rows if row.count(",") == 1]
    return sum(float(size) for pid, size in used if int(pid) in pids) * (1 << 20) / 1e6


def _resident_mb(pid: int) -> float:
    """Resident memory without mapped files, which come and go with the needs of other processes."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def schema_of(rng: random.Random) -> dict[str, Any]:
    """One of twenty schemas: the server remembers grammars, and the run is not about how that cache fills."""
    return {"type": "object", "properties": {f"a{rng.randrange(20)}": {"type": "integer"}}}


def words_of(rng: random.Random) -> str:
    """Up to sixty words, and now and then a long text."""
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 60) if rng.random() < 0.95 else 500))


def request_of(rng: random.Random) -> tuple[str, dict[str, Any], float | None]:
    """A path, a body and, for clients that leave early, after how many seconds."""
    patience_s = rng.random() if rng.random() < 0.15 else None
    body: dict[str, Any] = {"temperature": rng.choice((0, 1)), "stream": rng.random() < 0.6}
    route = rng.random()
    if route < 0.1:
        body |= {"input": words_of(rng), "instructions": SYSTEM, "store": rng.random() < 0.2}
        body["max_output_tokens"] = rng.randrange(1, 80)
        return "/v1/responses", body, patience_s
    body["max_tokens"] = rng.randrange(1, 80)
    kind = rng.random()
    if kind < 0.1:
        body |= {"n": 3, "temperature": 1}
    elif kind < 0.25:
        schema = {"name": "s", "schema": schema_of(rng)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif kind < 0.3:
        body["max_tokens"] = rng.choice((-1, 10**9, "x"))
    if route < 0.4:
        system = {"role": "system", "content": SYSTEM}
        body["messages"] = [system, {"role": "user", "content": words_of(rng)}]
        return "/v1/chat/completions", body, patience_s
    body |= {"prompt": words_of(rng), "logprobs": rng.choice((None, None, 5))}
    return "/v1/completions", body, patience_s


class Load:
    """The clients, and what they saw."""

    def __init__(self, url: str, end_s: float) -> None:
        self._url = url
        self._end_s = end_s
        self.statuses: dict[str, int] = {}

    async def client(self, seed: int) -> None:
        """One client, one request after the other."""
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_S) as http:
            while time.monotonic() < self._end_s:
                path, body, patience_s = request_of(rng)
                try:
                    answer = await asyncio.wait_for(http.post(path, json=body), patience_s)
                    outcome = str(answer.status_code)
                except TimeoutError:
                    outcome = "left"
                except httpx.ReadTimeout:
                    outcome = "timeout"
                    print("no answer:", path, json.dumps(body), file=sys.stderr)
                self.statuses[outcome] = self.statuses.get(outcome, 0) + 1


async def is_ready(http: httpx.AsyncClient) -> bool:
    """Whether the probe says so in time."""
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


async def meet_every_size(http: httpx.AsyncClient) -> None:
    """Prompts of every length of step, one at a time: libraries keep code for each size that they met."""
    rng = random.Random(1)
    for length in (*range(1, 17), *range(24, 513, 8)):
        ids = [rng.randrange(1000) for _ in range(length)]
        await http.post("/v1/completions", json={"prompt": ids, "max_tokens": 1})


async def run(server: Server, minutes: float, clients: int) -> dict[str, Any]:
    """Load and samples until the time is over."""
    async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S) as http:
        await meet_every_size(http)
    start = time.monotonic()
    load = Load(server.url, start + minutes * 60)
    workers = [asyncio.create_task(load.client(seed)) for seed in range(clients)]
    times: list[float] = []
    memory: dict[str, list[float]] = {name: [] for name in server.memory_mb()}
    failed_probes = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        while not all(worker.done() for worker in workers):
            times.append((time.monotonic() - start) / 60)
            for name, size in server.memory_mb().items():
                memory[name].append(round(size, 1))
            failed_probes += not await is_ready(http)
            await asyncio.sleep(1)
        metrics = (await http.get("/metrics")).text
    for worker in workers:
        worker.result()
    counts = dict(re.findall(r"^(engine_\w+_total)\{.*\} (\S+)$", metrics, re.MULTILINE))
    slopes = {name: slope_mb_per_hour(times, sizes) for name, sizes in memory.items()}
    return {
        "minutes": round(times[-1], 2),
        "answers": load.statuses,
        "failed_probes": failed_probes,
        **{name: float(value) for name, value in counts.items()},
        "slope_mb_per_hour": slopes,
        "times_min": times,
        "memory_mb": memory,
    }


def slope_mb_per_hour(times_min: list[float], sizes_mb: list[float]) -> float:
    """Least squares over the samples after warm-up."""
    skip = int(len(times_min) * WARM_UP_SHARE)
    hours = np.array(times_min[skip:]) / 60
    return round(float(np.polyfit(hours, np.array(sizes_mb[skip:]), 1)[0]), 3)


def write(result: dict[str, Any], folder: Path) -> None:
    """The plot and the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    series = [Series(name, result["times_min"], sizes) for name, sizes in result["memory_mb"].items()]
    rows = [
        [key, json.dumps(value)] for key, value in result.items() if key not in ("times_min", "memory_mb")
    ]
    intro = "Mixed load on one server; memory of its processes, sampled once a second."
    plot = line_plot("Memory", "minutes", "MB", series)
    (folder / "soak.html").write_text(page("Soak", intro, [table(["", ""], rows)], [plot]), encoding="utf-8")
    summary = {key: value for key, value in result.items() if key not in ("times_min", "memory_mb")}
    every = max(1, len(result["times_min"]) // 60)
    summary["memory_mb"] = {name: sizes[::every] for name, sizes in result["memory_mb"].items()}
    write_json(folder / "soak.json", summary)
    print(json.dumps({key: value for key, value in summary.items() if key != "memory_mb"}))


def is_good(result: dict[str, Any]) -> bool:
    """Whether every promise was kept."""
    return (
        max(result["slope_mb_per_hour"].values()) < MAX_SLOPE_MB
        and result["failed_probes"] == 0
        and result["engine_stalled_total"] == 0
        and result["engine_restarts_total"] == 0
        and not {"500", "timeout"} & set(result["answers"])
    )


def main(argv: list[str]) -> int:
    """The command; see the module."""
    own, _, flags = (
        (argv, None, []) if "--" not in argv else (argv[: argv.index("--")], 0, argv[argv.index("--") + 1 :])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(own)
    server = Server(args.model, flags or list(SERVE_FLAGS))
    try:
        result = asyncio.run(run(server, args.minutes, args.clients))
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
    head = {**about("benchmarks.soak", argv), "serve": server.command, "clients": args.clients}
    write(head | result, args.results)
    return 0 if is_good(result) else 1


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
