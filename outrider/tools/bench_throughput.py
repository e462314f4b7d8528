"""``outrider bench throughput``: all prompts at once into the engine, no HTTP; tokens a second at the end.

Called by the command line. Takes every engine flag of ``serve``.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from pathlib import Path

from outrider.cli.parser import add_engine_arguments, engine_config_of
from outrider.errors import ConfigError
from outrider.tools.bench_datasets import DATASETS, DatasetOptions, load_dataset
from outrider.tools.bench_html import serve_page
from outrider.tools.bench_load import LoadResult, Schedule
from outrider.tools.bench_metrics import compute_metrics
from outrider.tools.bench_offline import OfflineEngine, Work, located, sampled_copies, with_engine
from outrider.tools.bench_report import RunInfo
from outrider.tools.bench_tokenizer import open_codec
from outrider.tools.output_files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags and the engine's."""
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--backend", default="vllm", choices=("vllm",), help="accepted; the engine is outrider's"
    )
    group.add_argument("--dataset-name", default="random", choices=DATASETS)
    group.add_argument("--dataset-path", help="file of sharegpt (JSON) or custom (JSONL)")
    group.add_argument("--input-len", type=int, default=1024, help="tokens of a random prompt")
    group.add_argument("--output-len", type=int, help="tokens to generate (random: 128 unless given)")
    group.add_argument("--num-prompts", type=int, default=1000)
    group.add_argument("--n", type=int, default=1, help="sequences a prompt")
    group.add_argument(
        "--async-engine", action="store_true", help="accepted; the engine is always asynchronous"
    )
    group.add_argument(
        "--disable-detokenize", action="store_true", help="accepted; nothing is detokenized here"
    )
    group.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    group.add_argument("--html", metavar="FILE", help="write a page with plots beside the recipe's figures")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Start the engine, generate, print the figures."""
    if args.n < 1:
        raise ConfigError(f"--n is {args.n}; it must be at least 1.")
    check_writable(args.output_json, "--output-json")
    check_writable(args.html, "--html")
    config, tokenizer = located(engine_config_of(args))
    codec = open_codec([str(tokenizer)])
    options = DatasetOptions(
        name=args.dataset_name, path=args.dataset_path, num_prompts=args.num_prompts, seed=config.seed,
        input_len=args.input_len, output_len=args.output_len,
    )  # fmt: skip
    prompts = load_dataset(options, codec)
    work = sampled_copies([Work(codec.encode(prompt.text), prompt.output_len) for prompt in prompts], args.n)

    async def timed(engine: OfflineEngine) -> LoadResult:
        start = time.perf_counter()
        records = await engine.generate(work)
        return LoadResult(records, start, time.perf_counter() - start)

    load = with_engine(config, timed)
    prompt_tokens = sum(record.prompt_tokens or 0 for record in load.records)
    output_tokens = sum(record.output_tokens or 0 for record in load.records)
    rate = len(prompts) / load.duration_s
    total_rate, output_rate = (
        (prompt_tokens + output_tokens) / load.duration_s,
        output_tokens / load.duration_s,
    )
    print(
        f"Throughput: {rate:.2f} requests/s, {total_rate:.2f} total tokens/s, {output_rate:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {prompt_tokens}")
    print(f"Total num output tokens:  {output_tokens}")
    if args.output_json:
        result = {
            "elapsed_time": load.duration_s,
            "num_requests": len(prompts),
            "total_num_tokens": prompt_tokens + output_tokens,
            "requests_per_second": rate,
            "tokens_per_second": total_rate,
        }
        Path(args.output_json).write_text(json.dumps(result, indent=4), encoding="utf-8")
    if args.html:
        Path(args.html).write_text(_page(config.model, load), encoding="utf-8")
    return 0


def _page(model: str, load: LoadResult) -> str:
    info = RunInfo(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend="offline",
        label=None,
        model_id=model,
        tokenizer_id=None,
        num_prompts=len(load.records),
        schedule=Schedule(),
        metadata={},
        selected=("ttft", "tpot", "itl"),
        percentiles=(99.0,),
    )
    inputs = [record.prompt_tokens or 0 for record in load.records]
    outputs = [record.output_tokens or 0 for record in load.records]
    return serve_page(info, compute_metrics(load.records, inputs, outputs, load.duration_s), load, ())
