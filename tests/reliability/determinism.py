"""Run as a process by ``test_deterministic``: prints what every prompt gave, bit by bit, in every kind of company.

A process of its own, because ``--deterministic`` is decided once for a process. ``python -m
tests.reliability.determinism MODEL COUNT DETERMINISTIC``; the last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.runner.setup import build_engine
from outrider.types import Request, SamplingParams

Bits = dict[str, list[Any]]


def requests(count: int, vocab_size: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, many with common beginnings; half greedy, half sampled with their own seeds."""
    rng = random.Random(11)
    stems = [[rng.randrange(vocab_size) for _ in range(24)] for _ in range(6)]
    made = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.choice((0, 0, 9, 17, 24))]
        ids = stem + [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 16))]
        sampling = SamplingParams(max_tokens=6, temperature=float(i % 2), seed=i, logprobs=3, ignore_eos=True)
        made.append(Request(request_id=f"r{i}", prompt_token_ids=ids, sampling=sampling))
    return made


def build(model: str, deterministic: bool, **changes: Any) -> Engine:
    """An engine on the CPU."""
    settings: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 1200,
        "block_size": 4,
        "device": "cpu",
        "enable_prefix_caching": False,
        "deterministic": deterministic,
        **changes,
    }
    return build_engine(EngineConfig(model=model, **settings), lambda *_: None)[0]


def run(engine: Engine, work: list[Request], arrivals: random.Random | None) -> Bits:
    """Ids and log-probabilities of every request; with ``arrivals`` they come in at random times and order."""
    out: Bits = {request.request_id: [] for request in work}
    waiting = list(work)
    if arrivals is not None:
        arrivals.shuffle(waiting)
    while waiting or engine.has_work:
        if waiting and (arrivals is None or not engine.has_work or arrivals.random() < 0.5):
            for _ in range(1 if arrivals is None else arrivals.randrange(1, 24)):
                if waiting:
                    assert not engine.add(waiting.pop(0))
        if arrivals is None:
            while engine.has_work:
                take(engine, out)
        else:
            take(engine, out)
    engine.scheduler.check_integrity()
    return out


def take(engine: Engine, out: Bits) -> None:
    """One step."""
    for event in engine.step():
        assert event.finish_reason != "error", event.error
        for token, entry in zip(event.token_ids, event.logprobs or [], strict=True):
            out[event.request_id].append([token, entry.logprob, entry.top_ids, entry.top_logprobs])


def main(model: str, count: int, deterministic: bool) -> dict[str, Any]:
    """How many of ``count`` prompts differ from their run alone, per variant, and what a full batch costs."""
    os.sched_setaffinity(
        0, {max(os.sched_getaffinity(0))}
    )  # small products on busy cores wait for each other
    engine = build(model, deterministic)
    work = requests(count, 900)
    alone = run(engine, work, None)
    start = time.perf_counter()
    variants = {"in company": run(engine, work, random.Random(1))}
    seconds = time.perf_counter() - start
    engine.shutdown()
    for name, changes in {
        "in chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
        "prefix hits": {"enable_prefix_caching": True},
        "preempted": {"num_gpu_blocks_override": 60},
        "plain loop": {"async_scheduling": False},
    }.items():
        engine = build(model, deterministic, **changes)
        if name == "preempted":
            engine.scheduler.estimator.expected_total = lambda seq: seq.prompt_len  # type: ignore[method-assign]
        variants[name] = run(engine, work, random.Random(2))
        stats = engine.stats()
        assert name != "preempted" or count < 50 or stats.preemptions > count // 50, stats
        assert name != "prefix hits" or count < 50 or stats.cached_prompt_tokens > count, stats
        engine.shutdown()
    differing = {name: sum(bits[r] != alone[r] for r in alone) for name, bits in variants.items()}
    return {"differing": differing, "batch_seconds": round(seconds, 3)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "yes")))
