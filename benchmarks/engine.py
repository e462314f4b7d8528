"""The engine without HTTP: time of a prefill, a single stream and full decode batches, beside the floor.

    python -m benchmarks.engine --model DIR --load-format dummy [--batches 1,64,150] [--profile FILE]

The model runs in this process. Prompts are random ids. Each line gives the median step time, the tokens a second
and the time that reading the weights alone would take at the measured copy bandwidth. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.common import copy_bytes_per_s
from benchmarks.record import about, end_with, need_cuda
from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.models.config_hf import load_model_config
from outrider.runner.setup import build_engine
from outrider.types import Request, SamplingParams


class Driver:
    """Feeds an engine with random prompts and times its steps."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.engine = engine
        self._vocab_size = vocab_size
        self._rng = random.Random(0)
        self._count = 0

    def add(self, prompt_len: int, max_tokens: int) -> None:
        """Queue one greedy request of exactly these lengths."""
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(prompt_len)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._count += 1
        request = Request(request_id=f"b{self._count}", prompt_token_ids=prompt, sampling=params)
        for event in self.engine.add(request):
            raise SystemExit(f"refused: {event.error}")

    def run(self) -> list[tuple[float, int, int]]:
        """Steps until idle: ``(seconds, tokens computed, tokens generated)`` of each."""
        steps = []
        last = time.perf_counter()
        while self.engine.has_work:
            events = self.engine.step()
            now = time.perf_counter()
            generated = sum(len(event.token_ids) for event in events)
            steps.append((now - last, self.engine.stats().step_tokens, generated))
            last = now
        return steps


def prefill_ms(driver: Driver, prompt_len: int) -> float:
    """Median milliseconds from a prompt to its first token on an idle engine."""
    times = []
    for _ in range(4):
        driver.add(prompt_len, 1)
        start = time.perf_counter()
        driver.run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def decode(driver: Driver, batch: int, prompt_len: int, num_tokens: int) -> dict[str, float | None]:
    """``batch`` streams at once: median step time once all of them decode; None if they never did at once."""
    for _ in range(batch):
        driver.add(prompt_len, num_tokens)
    steps = driver.run()
    full = [seconds for seconds, _, generated in steps if generated == batch]
    median = statistics.median(full) if full else None
    whole = sum(seconds for seconds, _, _ in steps)
    return {
        "batch": batch,
        "step_ms": None if median is None else round(median * 1e3, 3),
        "decode_tok_s": None if median is None else round(batch / median, 1),
        "overall_tok_s": round(batch * num_tokens / whole, 1),
        "preemptions": driver.engine.stats().preemptions,
    }


def profile(driver: Driver, batch: int, prompt_len: int, warm_steps: int, steps: int) -> str:
    """Device time by kernel over ``steps`` steps, after ``warm_steps``; the first line gives the wall time."""
    for _ in range(batch):
        driver.add(prompt_len, warm_steps + steps)
    for _ in range(warm_steps):
        driver.engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            driver.engine.step()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - start) * 1e3
    driver.run()
    table = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60
    )
    return f"{steps} steps of {batch} x {prompt_len}, wall {wall_ms:.2f} ms\n{table}\n"


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--quantization")
    parser.add_argument("--batches", default="1,8,64,150")
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefills", default="1024,8192")
    parser.add_argument("--max-model-len", type=int, default=9216)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--profile-batch", type=int, default=64)
    parser.add_argument("--share", type=int, help="prompt tokens in a step that also decodes")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args()
    if args.profile is not None:
        need_cuda("--profile")
    result: dict[str, Any] = about("benchmarks.engine")
    if torch.cuda.is_available():
        result["copy_tb_s"] = round(copy_bytes_per_s() / 1e12, 3)
        torch.cuda.empty_cache()
    start = time.perf_counter()
    engine, info = build_engine(
        EngineConfig(
            model=args.model,
            load_format=args.load_format,
            quantization=args.quantization,
            kv_cache_dtype="fp8",
            max_model_len=args.max_model_len,
            enable_prefix_caching=False,
            enforce_eager=args.enforce_eager,
            prefill_share_tokens=args.share,
            gpu_memory_utilization=args.gpu_memory_utilization,
        ),
        lambda *_: None,
    )
    result |= {
        "start_s": round(time.perf_counter() - start, 2),
        "stages_s": info.startup_s,
    }
    result |= {"kv_capacity_tokens": info.kv_capacity_tokens, "weights_gb": info.weights_gb}
    print(info, flush=True)
    driver = Driver(engine, load_model_config(args.model).vocab_size)
    for length in (int(x) for x in args.prefills.split(",") if x):
        result[f"prefill_{length}_ms"] = round(prefill_ms(driver, length), 2)
        print(f"prefill {length}: {result[f'prefill_{length}_ms']} ms", flush=True)
    result["decode"] = []
    for batch in (int(x) for x in args.batches.split(",") if x):
        row = decode(driver, batch, args.prompt_len, args.tokens)
        result["decode"].append(row)
        print(row, flush=True)
    if args.profile:
        tables = [
            profile(driver, 1, 1024, 0, 1),
            profile(driver, 1, 1024, 4, 20),
            profile(driver, args.profile_batch, args.prompt_len, 40, 5),
        ]
        args.profile.write_text("".join(tables))
    print(json.dumps(result))


if __name__ == "__main__":
    end_with(main)
