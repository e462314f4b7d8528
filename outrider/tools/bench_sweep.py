"""``outrider bench sweep``: ``bench serve`` over a grid of concurrency and input lengths, one JSON and one
page.

Called by the command line. Every flag of ``bench serve`` holds for each point; the sweep sets only the input
length, ``--max-concurrency`` and the number of prompts. Points that are already in the output file are not
measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.tools import bench_flags, bench_serve
from outrider.tools.bench_html import sweep_page
from outrider.tools.bench_report import result_json, save_result, text_report
from outrider.tools.output_files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep's own flags and those of ``bench serve``."""
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--concurrency", default="1,8,32,128,512", help="comma-separated --max-concurrency values"
    )
    group.add_argument("--input-lens", default="1024", help="comma-separated input lengths in tokens")
    group.add_argument(
        "--prompts-per-stream", type=int, default=4, help="prompts a point = this x concurrency"
    )
    group.add_argument("--min-prompts", type=int, default=8, help="at least so many prompts a point")
    group.add_argument(
        "-o", "--output", default="sweep.json", help="JSON file, one point a line; resumed if it exists"
    )
    bench_flags.add_serve_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure every missing point, then write the page. Returns 1 when a point had no success."""
    bench_flags.check(args)
    output = Path(args.output)
    check_writable(output, "--output")
    points = _read_points(output)
    done = {(point["input_len"], point["max_concurrency"]) for point in points}
    grid = [(length, streams) for length in _ints(args.input_lens, "--input-lens") for streams in _ints(
        args.concurrency, "--concurrency")]  # fmt: skip
    target, codec = bench_serve.prepare(args)
    for input_len, streams in grid:
        if (input_len, streams) in done:
            continue
        print(f"== input {input_len}, concurrency {streams} ==")
        point_args = _point_args(args, input_len, streams)
        finished = bench_serve.measure(point_args, target, codec)
        print(text_report(finished.info, finished.metrics, args.report_style))
        if not finished.metrics.completed:
            raise ConfigError(
                f"No request succeeded at concurrency {streams}: {finished.load.records[0].error}"
            )
        point = result_json(
            finished.info, finished.metrics, finished.load, style="v1", detailed=args.save_detailed
        )
        point |= {"input_len": input_len, "output_len": bench_flags.dataset_from(point_args).output_len}
        save_result(point, output, append=True)
        points.append(point)
    page = Path(args.html) if args.html else output.with_suffix(".html")
    page.write_text(sweep_page(points), encoding="utf-8")
    print(f"{len(points)} points in {output}, page {page}")
    return 0


def _point_args(args: argparse.Namespace, input_len: int, streams: int) -> argparse.Namespace:
    point = copy.copy(args)
    point.input_len, point.max_concurrency = input_len, streams
    point.num_prompts = max(args.min_prompts, args.prompts_per_stream * streams)
    point.ready_check_timeout_sec = 0.0  # the server was found once; a test request a point would cost time
    return point


def _read_points(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if not all({"input_len", "max_concurrency"} <= point.keys() for point in points):
            raise ValueError("a line lacks input_len")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"--output {path} exists and is no sweep ({error}); name another file.") from error
    return points


def _ints(text: str, flag: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ConfigError(f"{flag} {text!r} must be whole numbers above 0, separated by commas.")
    return values
