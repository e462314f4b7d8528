"""``outrider bench kernels``: every kernel at Scout's sizes, checked, timed and set against its floor.

The suites are ``benchmarks/kernels`` of the source tree; each runs in a process of its own, so that one that fails
costs only its rows and this command stays without torch. The floor of a memory-bound kernel is the time of a
device-to-device copy of the same bytes, that of a compute-bound one the time of its FLOPs in a large cuBLASLt product;
both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

SUITES = ("elementwise", "gemm", "attention", "moe", "nvfp4", "sampling", "moves", "step", "few")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``outrider bench kernels``."""
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=SUITES, metavar="NAME",
        help=f"which suites to run: {', '.join(SUITES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--variants", action="store_true", help="also time the candidate launch constants of every kernel"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")


def run(args: argparse.Namespace) -> int:
    """Run the suites one after the other and print one table; 1 if a kernel was wrong or did not run.

    ``ConfigError`` without a CUDA device, before anything is measured.
    """
    if not has_cuda():
        raise no_cuda("bench kernels")
    root = find_suites()
    results = [run_suite(root, suite, args.variants) for suite in args.suite]
    rows = [row for result in results for row in result["rows"]]
    print_table(rows)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["outrider", "bench", "kernels", *_flags(args)])
        result = {"command": command, "suites": results}
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return int(any("error" in row for row in rows))


def _flags(args: argparse.Namespace) -> list[str]:
    """The options behind ``args``, but for those that are at their default."""
    suites = [] if tuple(args.suite) == SUITES else ["--suite", *args.suite]
    return [*suites, *(["--variants"] if args.variants else []), "--json", str(args.json)]


def no_cuda(what: str) -> ConfigError:
    """The error of ``what`` where torch sees no CUDA device."""
    return ConfigError(f"{what} needs a CUDA device and torch sees none; run it where the GPU is.")


def has_cuda() -> bool:
    """Whether torch sees a CUDA device, asked in a process of its own."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def find_suites() -> Path:
    """The source tree that holds the suites."""
    spec = importlib.util.find_spec("outrider")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parents[1]
    if not (root / "benchmarks" / "kernels").is_dir():
        raise ConfigError(
            "The kernel benchmarks are part of the source tree; clone it and install it with 'pip install -e .'."
        )
    return root


def run_suite(root: Path, suite: str, variants: bool) -> dict[str, Any]:
    """One suite's result file: device, versions and rows; a suite that ends early is one row with its last line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.kernels.{suite}", "--json", str(path)]
        done = subprocess.run(
            command if variants else [*command, "--quick"], cwd=root, text=True, stderr=subprocess.PIPE
        )
        if done.returncode == 0:
            result: dict[str, Any] = json.loads(path.read_text())
            return result
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return {"benchmark": suite, "rows": [{"case": suite, "variant": "", "us": None, "error": last}]}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row: what (kernel and shape), how long, how fast, and how near to the floor."""
    print(f"\n{'kernel':<30} {'variant':<30} {'us':>10} {'rate':>14} {'floor us':>10} {'of floor':>9}")
    for row in rows:
        time = "-" if row["us"] is None else f"{row['us']:.2f}"
        if "error" in row:
            rate, floor, share = str(row["error"]), "", ""
        else:
            unit, key = ("TFLOP/s", "tflop_per_s") if "tflop_per_s" in row else ("GB/s", "gb_per_s")
            rate, floor, share = f"{row[key]} {unit}", f"{row['floor_us']:.2f}", f"{row['percent']} %"
        print(f"{row['case']:<30} {row['variant'][:30]:<30} {time:>10} {rate:>14} {floor:>10} {share:>9}")
