"""``outrider bench latency``: seconds from submitting one batch to its last token, many times over, no HTTP.

Called by the command line. Takes every engine flag of ``serve``; the prefix cache is off unless asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from outrider.cli.parser import add_engine_arguments, engine_config_of
from outrider.errors import ConfigError
from outrider.tools.bench_offline import OfflineEngine, Work, located, sampled_copies, with_engine
from outrider.tools.bench_tokenizer import open_codec
from outrider.tools.output_files import check_writable
from outrider.tools.plots import Series, cdf_plot, line_plot, page, table

_PERCENTILES = (10, 25, 50, 75, 90, 99)
_LARGEST_ID = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags and the engine's."""
    group = parser.add_argument_group("benchmark")
    group.add_argument("--input-len", type=int, default=32)
    group.add_argument("--output-len", type=int, default=128)
    group.add_argument("--batch-size", type=int, default=8)
    group.add_argument("--n", type=int, default=1, help="sequences a prompt")
    group.add_argument("--num-iters-warmup", type=int, default=10)
    group.add_argument("--num-iters", type=int, default=30)
    group.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    group.add_argument("--html", metavar="FILE", help="write a page with plots")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Start the engine, time the batches, print average and percentiles."""
    for name in ("input_len", "output_len", "batch_size", "n", "num_iters"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if args.num_iters_warmup < 0:
        raise ConfigError(f"--num-iters-warmup is {args.num_iters_warmup}; it must be at least 0.")
    check_writable(args.output_json, "--output-json")
    check_writable(args.html, "--html")
    config, tokenizer = located(engine_config_of(args))
    if not hasattr(args, "enable_prefix_caching"):  # absent means that the flag was not typed
        config = replace(config, enable_prefix_caching=False)
    limit = min(open_codec([str(tokenizer)]).vocab_size, _LARGEST_ID)
    rng = random.Random(config.seed)

    def batch() -> list[Work]:
        prompts = [[rng.randrange(limit) for _ in range(args.input_len)] for _ in range(args.batch_size)]
        return sampled_copies([Work(prompt, args.output_len) for prompt in prompts], args.n)

    async def timed(engine: OfflineEngine) -> list[float]:
        times = []
        for _ in range(args.num_iters_warmup + args.num_iters):
            start = time.perf_counter()
            await engine.generate(batch())
            times.append(time.perf_counter() - start)
        return times[args.num_iters_warmup :]

    latencies = with_engine(config, timed)
    percentiles = {p: float(np.percentile(latencies, p)) for p in _PERCENTILES}
    print(f"Avg latency: {np.mean(latencies)} seconds")
    for percentile, value in percentiles.items():
        print(f"{percentile}% percentile latency: {value} seconds")
    if args.output_json:
        result = {
            "avg_latency": float(np.mean(latencies)),
            "latencies": latencies,
            "percentiles": percentiles,
        }
        Path(args.output_json).write_text(json.dumps(result, indent=4), encoding="utf-8")
    if args.html:
        Path(args.html).write_text(_page(args, config.model, latencies, percentiles), encoding="utf-8")
    return 0


def _page(args: argparse.Namespace, model: str, latencies: list[float], percentiles: dict[int, float]) -> str:
    intro = f"{model}: {args.batch_size} prompts of {args.input_len} tokens, {args.output_len} generated, no HTTP."
    rows = [["Average, s", f"{np.mean(latencies):.4f}"]]
    rows += [[f"P{percentile}, s", f"{value:.4f}"] for percentile, value in percentiles.items()]
    order = line_plot(
        "Latency by iteration",
        "iteration",
        "seconds",
        [Series("batch", range(len(latencies)), latencies, points=True)],
    )
    distribution = cdf_plot("Latency", "ms", [1000 * value for value in latencies])
    return page("Batch latency", intro, [table(["", "This run"], rows)], [order, distribution])
