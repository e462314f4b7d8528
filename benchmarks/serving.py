"""The recipe's serving benchmark on this machine: start `outrider serve`, measure it over HTTP, keep the figures.

    python -m benchmarks.serving --model DIR --quantization modelopt --out FILE [-- extra serve flags]

DIR is a checkpoint folder. With ``--load-format dummy``, the default, its config and tokenizer are enough: weights are
random and none are read, so a speed can be measured where the checkpoint is not.

Times the launch until the server is ready, then one stream (1,024 in, 128 out), then the recipe's load. FILE gets
the commands, the GPU, the date, the versions, every figure, and how many requests were preempted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.record import about, as_typed, end_with, write

READY = "Application startup complete."
PROGRAM = [sys.executable, "-m", "outrider"]


def start_server(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], float]:
    """The server process and the seconds it took to be ready; its output goes to ``log``."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if READY in log.read_text(errors="replace"):
            return process, time.perf_counter() - start
        time.sleep(0.05)
    raise SystemExit(
        f"the server ended while it started; see {log}\n{log.read_text(errors='replace')[-3000:]}"
    )


def bench(args: argparse.Namespace, num_prompts: int, concurrency: int, output_len: int) -> dict[str, Any]:
    """One run of `outrider bench serve` with the recipe's arguments; its JSON result."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*PROGRAM, "bench", "serve", "--host", "127.0.0.1", "--port", str(args.port)]
        command += ["--model", args.model, "--dataset-name", "random", "--ignore-eos", "--disable-tqdm"]
        command += ["--random-input-len", str(args.input_len), "--random-output-len", str(output_len)]
        command += ["--max-concurrency", str(concurrency), "--num-prompts", str(num_prompts)]
        command += [
            "--temperature",
            "0",
            "--save-result",
            "--result-dir",
            folder,
            "--result-filename",
            "r.json",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout[-2600:], flush=True)
        if done.returncode:
            raise SystemExit(f"bench serve failed with {done.returncode}")
        result: dict[str, Any] = json.loads((Path(folder) / "r.json").read_text())
        return {"command": as_typed(command), **result}


def preemptions(port: int) -> float:
    """Preempted requests so far, from the server's metrics; ``SystemExit`` if they do not say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        found = re.search(r"^vllm:num_preemptions_total\{.*\} ([\d.e+]+)", response.read().decode(), re.M)
    if found is None:
        raise SystemExit("the server's metrics have no vllm:num_preemptions_total")
    return float(found[1])


def main() -> None:
    """Start, measure, stop, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--num-prompts", type=int, default=512)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=1024)
    parser.add_argument("--single-output-len", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=9216)
    parser.add_argument("--only-start", action="store_true", help="time the launch, measure no requests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("serve_flags", nargs="*")
    args = parser.parse_args()
    command = [*PROGRAM, "serve", args.model, "--host", "0.0.0.0", "--port", str(args.port)]
    command += ["--load-format", args.load_format, "--kv-cache-dtype", "fp8", "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", "512", "--max-num-batched-tokens", "8192"]
    command += ["--max-model-len", str(args.max_model_len), *args.serve_flags]
    if args.quantization:
        command += ["--quantization", args.quantization]
    log = args.out.with_suffix(".log")
    server, ready_s = start_server(command, log)
    result: dict[str, Any] = {
        "serve": as_typed(command),
        "ready_s": round(ready_s, 2),
        "log": [x for x in log.read_text().splitlines() if "KV cache" in x],
    }
    try:
        if args.only_start:
            return
        bench(args, 2, 1, 8)  # the first requests of a server pay for what no warm-up met
        result["single"] = bench(args, 4, 1, args.single_output_len)
        before = preemptions(args.port)
        result["load"] = bench(args, args.num_prompts, args.concurrency, args.output_len)
        result["preemptions"] = preemptions(args.port) - before
    finally:
        server.terminate()
        server.wait(timeout=90)
        write(args.out, about("benchmarks.serving") | result)
        print(f"ready after {ready_s:.1f} s", flush=True)
    load, single = result["load"], result["single"]
    print(
        json.dumps(
            {
                "ready_s": result["ready_s"],
                "output_tok_s": load["output_throughput"],
                "single_tpot_ms": single["mean_tpot_ms"],
                "single_ttft_ms": single["mean_ttft_ms"],
                "preemptions": result["preemptions"],
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    end_with(main)
