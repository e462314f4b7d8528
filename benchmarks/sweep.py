"""How the engine grows: step time against its floor, over concurrency and input length. No HTTP.

    python -m benchmarks.sweep --model DIR --out FILE [--time-limit 540] [--concurrency 1,8] [--lengths 1024,8192]

A decode point holds as many streams of that context as the KV cache takes, up to the concurrency, and times steps in
which all of them decode. What the cache holds is noise: keys and values of the prompts are not computed, since a
decode step takes as long whatever they are, and 20 points cost seconds each. A prefill point times one prompt
from its arrival to its first token. Points come in the order of their weight; FILE and FILE.html are rewritten after
each, and ``--time-limit`` seconds after the start the rest is listed as skipped. The floor is ``benchmarks.floors``
with the rates that this device reached at the start of the run.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import Floor, ModelCost, Rates
from benchmarks.record import about, as_json, end_with
from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.kv_manager import KVManager
from outrider.engine.sequence import Sequence as EngineSequence
from outrider.models.config_hf import load_model_config
from outrider.runner.executor import InlineExecutor
from outrider.runner.setup import build_engine
from outrider.tools.plots import Series, line_plot, number, page, table
from outrider.types import EngineInfo, Request, SamplingParams

CONCURRENCY = (1, 8, 32, 128, 512)
LENGTHS = (1024, 8192, 32768, 131072)
WARM_STEPS = 8
"""Steps before the measured ones: graphs that the start did not capture are captured here."""
Point = tuple[str, int, int]
"""``(kind, concurrency, length)``."""
TOO_LATE = "the time limit of the run was over"
TOO_LARGE = "the KV cache does not hold such a stream for long enough"


class FilledCache(KVManager):
    """Books of a cache in which, while ``pretend`` is set, every prompt but its last token is already computed."""

    def __init__(self, other: KVManager) -> None:
        super().__init__(other.layout, other.pool.num_blocks, enable_prefix_caching=False)
        self.pretend = False

    def match_prefix(self, seq: EngineSequence) -> int:
        """Blocks of the sequence's own for all tokens but the last; 0 where there are too few."""
        count = len(seq.token_ids) - 1
        size = self.layout.block_size
        if not self.pretend:
            return 0
        wanted, first_local = -(-count // size), self.chunk_start(count) // size
        firsts = [first_local if is_local else 0 for is_local in self.layout.local]
        blocks = self.pool.try_allocate(sum(wanted - first for first in firsts))
        if blocks is None:
            return 0
        for block_table, first in zip(seq.block_tables, firsts, strict=True):
            block_table.extend([0] * first)
            block_table.extend(blocks.pop() for _ in range(wanted - first))
        return count


class Bench:
    """An engine, its floor, and the clock of the whole run."""

    def __init__(self, engine: Engine, cost: ModelCost, rates: Rates, args: argparse.Namespace) -> None:
        self.engine = engine
        self.cost = cost
        self.rates = rates
        self.num_steps: int = args.steps
        self.point_s: float = args.point_seconds
        self.max_step_tokens: int = engine.scheduler.limits.max_num_batched_tokens
        self.cache = engine.scheduler.kv = FilledCache(engine.scheduler.kv)
        self._rng = random.Random(0)
        self._live: list[str] = []
        self._count = 0

    def decode(self, concurrency: int, context: int) -> dict[str, Any] | None:
        """Step time with ``concurrency`` streams of ``context`` tokens, or as many as fit; None where none does."""
        before = self.engine.stats().preemptions
        prompt = self._prompt(context)
        self.cache.pretend = True
        max_tokens = self.num_steps + 4 * WARM_STEPS
        room = self.cache.pool.capacity // self.cache.num_blocks_for(context + max_tokens)
        for _ in range(min(concurrency, room)):  # more would start one by one, as the others end
            self._add([*prompt[:-1], self._rng.randrange(self.cost.config.vocab_size)], max_tokens)
        times, streams = self._timed_steps()
        self._clear()
        self.cache.pretend = False
        if not times:
            return None
        median = statistics.median(times)
        floor = self.cost.decode(streams, context + WARM_STEPS + len(times) // 2, self.rates)
        return {
            "kind": "decode",
            "concurrency": concurrency,
            "length": context,
            "streams": streams,
            "steps": len(times),
            "ms": round(median * 1e3, 3),
            "p90_ms": round(sorted(times)[len(times) * 9 // 10] * 1e3, 3),
            "tok_s": round(streams / median, 1),
            "preemptions": self.engine.stats().preemptions - before,
            **_against(median, floor),
        }

    def prefill(self, length: int) -> dict[str, Any]:
        """Time of one prompt on the idle engine, from its arrival to its first token: median of up to three."""
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < 4 and (len(times) < 2 or time.perf_counter() - start < self.point_s):
            self._add(self._prompt(length), 1)
            begin = time.perf_counter()
            while self.engine.has_work:
                self.engine.step()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[1:])  # the first may compile or capture
        floor = self.cost.prefill(length, self.max_step_tokens, self.rates)
        return {
            "kind": "prefill",
            "concurrency": 1,
            "length": length,
            "steps": len(times) - 1,
            "ms": round(seconds * 1e3, 3),
            "tok_s": round(length / seconds, 1),
            **_against(seconds, floor),
        }

    def _timed_steps(self) -> tuple[list[float], int]:
        """Seconds of the steps in which the most streams got a token, and how many streams those were."""
        steps: list[tuple[float, int]] = []
        last = start = time.perf_counter()
        while self.engine.has_work and len(steps) < self.num_steps + 2 * WARM_STEPS:
            events = self.engine.step()
            now = time.perf_counter()
            steps.append((now - last, sum(len(event.token_ids) for event in events)))
            last = now
            if now - start > self.point_s and len(steps) > 2 * WARM_STEPS:
                break
        most = max((tokens for _, tokens in steps), default=0)
        return [seconds for seconds, tokens in steps if tokens == most][WARM_STEPS:], most

    def _prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.cost.config.vocab_size) for _ in range(length)]

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._count += 1
        self._live.append(f"s{self._count}")
        for event in self.engine.add(
            Request(request_id=self._live[-1], prompt_token_ids=prompt, sampling=params)
        ):
            raise SystemExit(f"refused: {event.error}")

    def _clear(self) -> None:
        for request_id in self._live:
            self.engine.abort(request_id)
        self._live.clear()
        while self.engine.has_work:
            self.engine.step()


def _against(seconds: float, floor: Floor) -> dict[str, Any]:
    parts = {name: getattr(floor, f"{name}_s") for name in ("dense", "experts", "attention", "head")}
    return {
        "floor_ms": round(floor.seconds * 1e3, 4),
        "percent_of_floor": round(100 * floor.seconds / seconds, 1),
        "floor_parts_ms": {name: round(value * 1e3, 4) for name, value in parts.items()},
        "gb": round(floor.num_bytes / 1e9, 3),
        "tflop": round(floor.flops / 1e12, 4),
    }


def points(concurrency: Sequence[int], lengths: Sequence[int]) -> list[Point]:
    """All points by weight: short contexts and the extremes of concurrency first."""
    by_weight = sorted(concurrency, key=lambda c: (c not in (min(concurrency), max(concurrency)), -c))
    ordered: list[Point] = []
    for length in sorted(lengths):
        ordered.append(("prefill", 1, length))
        ordered += [("decode", count, length) for count in by_weight]
    return ordered


def measure_rates(device: torch.device) -> Rates:
    """What this device reaches, in a second: a large copy, and large products in the operands that Scout uses."""
    if device.type == "cuda":
        from benchmarks.kernels.common import copy_bytes_per_s, product_flops_per_s

        rates = Rates(copy_bytes_per_s(), product_flops_per_s("fp8"), product_flops_per_s("bf16"))
        torch.cuda.empty_cache()
        return rates
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    copied = _best_rate(lambda: target.copy_(source), 2 * source.nbytes)
    a = torch.randn(1024, 1024)
    product = _best_rate(lambda: a @ a, 2 * 1024**3)
    return Rates(copied, product, product)


def _best_rate(call: Callable[[], object], work: float) -> float:
    """``work`` a second: the best of some calls on the CPU."""
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return work / best


def fill_with_noise(data: torch.Tensor) -> None:
    """Random finite values in the whole cache: bits that change cost power, which zeros would save."""
    if data.dtype == torch.float8_e4m3fn:
        data.view(torch.int64).random_(-(2**63), None)
        data.view(torch.uint8).bitwise_and_(0xBF)  # the top exponent bit off: no NaN, below two
    else:
        data.normal_()


def sweep_page(result: dict[str, Any]) -> str:
    """The rows so far as one self-contained HTML text: measured against floor, by length."""
    rows = result["points"]
    decodes = [row for row in rows if row["kind"] == "decode"]
    prefills = sorted((row for row in rows if row["kind"] == "prefill"), key=lambda row: row["length"])
    by_length = {
        length: sorted((r for r in decodes if r["length"] == length), key=lambda r: r["streams"])
        for length in sorted({row["length"] for row in decodes})
    }

    def curve(label: str, found: Sequence[dict[str, Any]], y: str, x: str = "streams") -> Series:
        return Series(label, [row[x] for row in found], [row[y] for row in found], points=True)

    plots = [
        line_plot(
            f"Decode step at {length:,} tokens of context", "streams", "ms",
            [curve("measured", found, "ms"), curve("floor", found, "floor_ms")],
            log_x=True, log_y=True,
        )
        for length, found in by_length.items()
    ]  # fmt: skip
    for title, unit, key in (
        ("Decode throughput", "tokens a second", "tok_s"),
        ("Floor as a share of the step", "%", "percent_of_floor"),
    ):
        series = [curve(f"{length:,} tokens", found, key) for length, found in by_length.items()]
        plots.append(line_plot(title, "streams", unit, series, log_x=True))
    series = [curve("measured", prefills, "ms", "length"), curve("floor", prefills, "floor_ms", "length")]
    plots.append(
        line_plot("One prompt to its first token", "prompt tokens", "ms", series, log_x=True, log_y=True)
    )
    header = [
        "point",
        "streams",
        "ms",
        "floor ms",
        "floor, % of it",
        "tokens a second",
        "GB",
        "TFLOP",
        "date",
    ]
    cells = [
        [
            _name(row),
            str(row.get("streams", 1)),
            *(number(row[key]) for key in ("ms", "floor_ms", "percent_of_floor", "tok_s", "gb", "tflop")),
            row.get("date", result["date"]),
        ]
        for row in rows
    ]
    tables = [table(header, cells)]
    if result["skipped"]:
        tables.append(table(["not measured", "because"], [[_name(x), x["why"]] for x in result["skipped"]]))
    made = f"{result['model']} on {result['device']}, torch {result['torch']}, Triton {result['triton']}"
    note = f" Note: {result['note']}." if "note" in result else ""
    intro = f"{made}, {result['date']}: {result['command']}. {_HOW}{note}"
    return page("Step time against the floor", intro, tables, plots)


def _name(point: dict[str, Any]) -> str:
    return f"{point['kind']} {point['concurrency']} x {point['length']:,}"


_HOW = (
    "Fewer streams than asked for are those that the KV cache held. The floor is the time of the bytes and FLOPs of "
    "the step at the rates that this device reached for a large copy and large products."
)


def write(result: dict[str, Any], out: Path) -> None:
    """Both files, each replaced whole."""
    for path, text in (
        (out, as_json(result)),
        (out.with_suffix(".html"), sweep_page(result)),
    ):
        partial = path.with_name(path.name + ".part")
        partial.write_text(text)
        os.replace(partial, path)


def parse_args() -> argparse.Namespace:
    """The options; see the head of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON; a page of the same name is put beside it"
    )
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--quantization")
    parser.add_argument("--kv-cache-dtype", default="fp8")
    parser.add_argument("--concurrency", default=",".join(map(str, CONCURRENCY)))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--steps", type=int, default=100, help="measured steps of a decode point")
    parser.add_argument(
        "--point-seconds", type=float, default=10.0, help="a point measures no longer than this"
    )
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no point begins")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--num-gpu-blocks-override", type=int)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace, lengths: Sequence[int]) -> tuple[Engine, EngineInfo]:
    """The engine that ``outrider serve`` would build, its context long enough for the longest point."""
    most = max(lengths) + args.steps + 4 * WARM_STEPS
    return build_engine(
        EngineConfig(
            model=args.model,
            load_format=args.load_format,
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            max_model_len=-(-most // 64) * 64,
            enable_prefix_caching=False,
            enforce_eager=args.enforce_eager,
            gpu_memory_utilization=args.gpu_memory_utilization,
            num_gpu_blocks_override=args.num_gpu_blocks_override,
            block_size=args.block_size,
        ),
        lambda *_: None,
    )


def main() -> None:
    """Build, then point after point."""
    start = time.perf_counter()
    args = parse_args()
    concurrency, lengths = ([int(x) for x in text.split(",")] for text in (args.concurrency, args.lengths))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measure_rates(device)
    config = load_model_config(args.model)
    if config.quant is None:
        rates = Rates(rates.bytes_per_s, rates.attention_flops, rates.attention_flops)
    engine, info = build(args, lengths)
    if device.type == "cuda":  # on a CPU the pages stay untouched until a token is stored in them
        assert isinstance(engine.executor, InlineExecutor)
        fill_with_noise(engine.executor.runner.kv.data)
    cost = ModelCost.of(config, getattr(torch, info.dtype), getattr(torch, info.kv_cache_dtype))
    bench = Bench(engine, cost, rates, args)
    result: dict[str, Any] = {
        **about("benchmarks.sweep"),
        "model": args.model,
        "rates": {
            "copy_tb_s": round(rates.bytes_per_s / 1e12, 4),
            "linear_tflop_s": round(rates.linear_flops / 1e12, 3),
            "attention_tflop_s": round(rates.attention_flops / 1e12, 3),
        },
        "start_s": round(time.perf_counter() - start, 1),
        "kv_capacity_tokens": info.kv_capacity_tokens,
        "skipped": [],
        "points": [],
    }
    print({key: result[key] for key in ("device", "rates", "start_s", "kv_capacity_tokens")}, flush=True)
    for kind, count, length in points(concurrency, lengths):
        is_late = time.perf_counter() - start > args.time_limit
        row = None
        if not is_late:
            row = bench.prefill(length) if kind == "prefill" else bench.decode(count, length)
        if row is None:
            why = TOO_LATE if is_late else TOO_LARGE
            row = {"kind": kind, "concurrency": count, "length": length, "why": why}
            result["skipped"].append(row)
        else:
            result["points"].append(row)
        print({key: value for key, value in row.items() if key != "floor_parts_ms"}, flush=True)
        write(result, args.out)
    print(f"{len(result['points'])} points, {len(result['skipped'])} skipped, {args.out}", flush=True)


if __name__ == "__main__":
    end_with(main)
