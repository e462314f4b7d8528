"""Scheduling policies side by side, without a GPU: the real scheduler, timed by what steps cost on an H200.

    python -m benchmarks.policies [--out FILE] [--requests 512] [--shares 512,1024,8192]

Runs the recipe's load (1,024 in, 1,024 out, 512 at once) through ``engine.scheduler`` and adds up a cost model of its
steps: for each share of prompt tokens beside decodes, with even starts and a planned end, with even starts alone, and
with starts as early as memory allows. Prints output tokens/s, the steps, and the median and P99 time between two
tokens of a stream.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import about, end_with, write
from outrider.engine.kv_manager import KVManager
from outrider.engine.plan import Plan
from outrider.engine.scheduler import Limits, Scheduler
from outrider.engine.starts import Pacer, Starts
from outrider.kv_layout import plan_layout
from outrider.types import Request, SamplingParams, StepResult

LAYERS, HEADS, HEAD_DIM = 48, 40, 128
LAYOUT = plan_layout(tuple((i + 1) % 4 != 0 for i in range(LAYERS)), 8192, 9216, 64)
INPUT, OUTPUT, CONCURRENCY, MAX_TOKENS = 1024, 1024, 512, 8192


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step of full-size Scout. ``tokens`` and ``layer_us``: a layer without attention, by tokens.

    ``num_blocks``: blocks of the KV cache beside the weights of one H200.
    """

    num_blocks: int
    tokens: tuple[int, ...]
    layer_us: tuple[float, ...]

    def seconds(self, contexts: list[int], prompts: list[tuple[int, int]]) -> float:
        """``contexts`` of the decodes and ``(start, count)`` of the prompt pieces in the step."""
        num_tokens = len(contexts) + sum(count for _, count in prompts)
        layer = float(np.interp(num_tokens, self.tokens, self.layer_us))
        layer += sum(contexts) * 2048 / DECODE_BYTES_PER_US + 5 * bool(contexts)
        for start, count in prompts:
            layer += 20 + count * (start + count / 2) * HEADS * HEAD_DIM * 4 / PREFILL_FLOP_PER_US
        return (LAYERS * layer + 800 + 1.5 * len(contexts)) / 1e6


DECODE_BYTES_PER_US, PREFILL_FLOP_PER_US = 3.95e6, 580e6
COSTS = {
    "FP8": StepCost(
        24_912,
        (1, 8, 16, 64, 110, 200, 256, 512, 622, 768, 878, 1024, 1134, 1390, 1655, 2040, 8192),
        (91, 278, 350, 562, 562, 574, 643, 710, 772, 831, 925, 961, 1054, 1213, 1290, 1500, 6200),
    ),
    "NVFP4": StepCost(
        51_798,
        (1, 8, 16, 64, 110, 200, 256, 512, 622, 768, 878, 1024, 1134, 1390, 1655, 2040, 8192),
        (89, 223, 254, 384, 388, 436, 497, 598, 670, 742, 817, 957, 1061, 1210, 1290, 1680, 6280),
    ),
}
"""H200, 2026-11-27: layers under a lasting load at these sizes (trials_h200.txt); 8,192 tokens: whole steps."""


class Eager(Pacer):
    """Starts that wait for nothing but memory."""

    @property
    def may_start(self) -> bool:
        """Always."""
        return True


POLICIES = ("even, last wave together", "even", "as early as memory allows")


def run(cost: StepCost, share: int, policy: str, num_requests: int) -> dict[str, Any]:
    """The figures of one policy."""
    kv = KVManager(LAYOUT, cost.num_blocks, False)
    scheduler = Scheduler(kv, Limits(CONCURRENCY, MAX_TOKENS, share))
    if policy != POLICIES[0]:
        scheduler.starts = Starts(kv, share, CONCURRENCY, patience=math.inf)
    if policy == POLICIES[2]:
        scheduler.starts._pacer = Eager(kv.pool.capacity)
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    num_sent, seconds, steps = 0, 0.0, 0
    gaps: list[tuple[float, int]] = []
    while scheduler.has_work or num_sent < num_requests:
        while len(scheduler._by_id) < CONCURRENCY and num_sent < num_requests:
            scheduler.add(Request(request_id=f"r{num_sent}", prompt_token_ids=[1] * INPUT, sampling=params))
            num_sent += 1
        plan = scheduler.schedule()
        assert plan is not None
        contexts, prompts = split(plan)
        step_s = cost.seconds(contexts, prompts)
        seconds, steps = seconds + step_s, steps + 1
        gaps.append((step_s, len(contexts)))
        num_samples = sum(piece.samples for piece in plan.step.slices)
        scheduler.commit(plan, StepResult(plan.step.step_id, [5] * num_samples, [None] * num_samples, {}))
    of_streams = np.repeat([gap for gap, _ in gaps], [count for _, count in gaps]) * 1e3
    return {
        "share": share,
        "starts": policy,
        "output_tok_s": round(num_requests * OUTPUT / seconds),
        "steps": steps,
        "median_itl_ms": round(float(np.median(of_streams)), 1),
        "p99_itl_ms": round(float(np.percentile(of_streams, 99)), 1),
        "preemptions": scheduler.stats.preemptions,
    }


def split(plan: Plan) -> tuple[list[int], list[tuple[int, int]]]:
    """Contexts of the plan's decodes, and its pieces of prompts."""
    contexts, prompts = [], []
    for piece in plan.step.slices:
        if piece.num_tokens == 1:  # the last token of a prompt runs as a decode does
            contexts.append(piece.start)
        else:
            prompts.append((piece.start, piece.num_tokens))
    return contexts, prompts


def main() -> None:
    """Every policy on both checkpoints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--shares", default="512,1024,8192")
    args = parser.parse_args()
    result: dict[str, Any] = {
        **about("benchmarks.policies", device="none: the steps' times come from a cost model of an H200"),
        "what": "the real scheduler, timed by a cost model of steps on an H200; no GPU in this run",
        "requests": args.requests,
    }
    for name, cost in COSTS.items():
        result[name] = []
        for share in (int(text) for text in args.shares.split(",")):
            for policy in POLICIES:
                row = run(cost, share, policy, args.requests)
                result[name].append(row)
                print(name, row, flush=True)
    write(args.out, result)


if __name__ == "__main__":
    end_with(main)
