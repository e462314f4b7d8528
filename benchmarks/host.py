"""What the host spends: front-end CPU a streamed token, engine-loop CPU a step, and how late steps begin.

    python -m benchmarks.host [--streams 512] [--step-ms 51.2] [--window 15] [--out FILE]

`outrider serve` runs as it is, in front of an engine process whose device is a clock (``benchmarks.host_engine``);
``benchmarks.host_client`` reads the streams. Front-end figures are CPU time of its process alone, so a busy machine
blurs them little; lateness is the time that the pretended device idled, and does suffer from other work.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.host_engine import step_costs
from benchmarks.record import about, as_json, cpu, end_with, write
from benchmarks.serving import start_server

ROOT = Path(__file__).resolve().parents[1]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
HOOK = """import sys
if "outrider.engine.process" in sys.orig_argv:
    from benchmarks.host_engine import install
    install()
"""


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of a process so far in its own code and in the kernel, its children not counted."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return {"user": int(fields[11]) / ticks, "kernel": int(fields[12]) / ticks}


def measure(args: argparse.Namespace, pid: int, path: str) -> dict[str, Any]:
    """One endpoint: the client's lines, with the front end's CPU time at both ends of the window."""
    tokens = int((args.window + 30) * 1e3 / args.step_ms) + 100
    command = [sys.executable, "-m", "benchmarks.host_client", str(args.port), path]
    command += [str(args.streams), str(min(tokens, 4000)), str(args.window)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert client.stdout is not None
    result: dict[str, Any] = {}
    for line in client.stdout:
        row = json.loads(line)
        if row["event"] == "gaps_ms":
            result["client"] = {key: value for key, value in row.items() if key != "event"}
        else:
            result[row["event"]] = {**row, "cpu_s": cpu_s(pid)}
    if client.wait():
        raise SystemExit(f"the client failed with {client.returncode}")
    return result


def summary(measured: dict[str, Any], records: list[list[float]]) -> dict[str, Any]:
    """Figures of one window from the client's lines and the engine's records."""
    begin, end = measured["start"], measured["end"]
    inside = [row for row in records if begin["t"] <= row[0] <= end["t"]]
    tokens = sum(int(row[4]) for row in inside)
    seconds = end["t"] - begin["t"]
    front = {part: end["cpu_s"][part] - begin["cpu_s"][part] for part in ("user", "kernel")}
    front_s = sum(front.values())
    first, last, steps = inside[0], inside[-1], len(inside) - 1
    idle = [row[3] for row in inside]
    return {
        "tokens_per_s": round(tokens / seconds),
        "chunks_per_s": round(end["chunks"] / seconds),
        "front_end_us_per_token": round(front_s / tokens * 1e6, 1),
        "front_end_us_per_chunk": round(front_s / end["chunks"] * 1e6, 1),
        "of_which_us": {part: round(value / tokens * 1e6, 1) for part, value in front.items()},
        "front_end_cpu": round(front_s / seconds, 3),
        "engine_thread_ms_per_step": round((last[1] - first[1]) / steps * 1e3, 3),
        "engine_process_ms_per_step": round((last[2] - first[2]) / steps * 1e3, 3),
        "steps": steps,
        "late_ms": {
            "mean": round(statistics.mean(idle) * 1e3, 3),
            "p99": round(sorted(idle)[len(idle) * 99 // 100] * 1e3, 3),
            "max": round(max(idle) * 1e3, 3),
        },
        "late_share": round(sum(idle) / seconds, 4),
        "client": measured["client"],
    }


def main() -> None:
    """Start the server, measure both endpoints, stop, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=51.2, help="512 streams at 10,000 tokens a second")
    parser.add_argument("--window", type=float, default=15.0, help="seconds of measuring")
    parser.add_argument("--endpoints", default=",".join(PATHS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        args.port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(HOOK)
        records, log = Path(folder) / "records.json", Path(folder) / "log"
        os.environ |= {
            "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
            "HOST_STEP_MS": str(args.step_ms),
            "HOST_RECORDS": str(records),
        }
        command = [sys.executable, "-m", "outrider", "serve", "--port", str(args.port), "--host", "127.0.0.1"]
        server, _ = start_server([*command, "--max-num-queued-tokens", "10000000"], log)
        try:
            measured = {name: measure(args, server.pid, PATHS[name]) for name in args.endpoints.split(",")}
        finally:
            server.terminate()
            server.wait(timeout=60)
        rows = json.loads(records.read_text())
    result: dict[str, Any] = {
        **about("benchmarks.host", device=cpu()),  # a GPU has no part in it
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("uvicorn", "uvloop", "msgspec", "fastapi", "numpy")},
        "streams": args.streams,
        "step_ms": args.step_ms,
        "engine_alone_ms": step_costs(args.streams, num_steps=200, pause_s=0.03),
        **{name: summary(row, rows) for name, row in measured.items()},
    }
    print(as_json(result))
    write(args.out, result)


if __name__ == "__main__":
    end_with(main)
