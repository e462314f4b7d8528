"""The invariance suite on real models: how work is cut, shared, interrupted or spread must not change a token.

The baseline computes each prompt alone, in one piece, with the plain loop and no prefix cache. Every variant must give
the same greedy ids. Another cut of the work adds floats in another order, so ids are compared up to the first step
whose two best logits are closer than the model's bound below; a step that close may legitimately fall either way.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.models.gguf import embedded_model_path
from outrider.runner.setup import build_engine
from outrider.types import Request, SamplingParams

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FIXTURES = SHARED / "fixtures"
CHUNK = 32
"""Chunk of the tiny Llama 4's local layers: prompts and outputs below end on, before and behind its borders."""


@dataclass(frozen=True)
class Case:
    """A model, what to serve it with, and the gap between logits below which a step does not count."""

    folder: str
    margin: float
    settings: dict[str, Any]
    few_blocks: int = 26
    tensor_ranks: int = 2

    @property
    def path(self) -> str:
        """Where the model is."""
        return str(FIXTURES / self.folder) if self.folder else str(embedded_model_path())


CASES = {
    # 9 query and 3 key heads: only three ranks share them evenly.
    "SmolLM2": Case("", 1e-3, {"block_size": 8, "max_model_len": 96}, few_blocks=14, tensor_ranks=3),
    "BF16 in float32": Case("llama4-tiny-a/bf16", 1e-3, {"dtype": "float32"}),
    # Rounding to FP8 can turn a last-bit difference into a whole step of the coarser grid.
    "FP8, FP8 KV": Case("llama4-tiny-a/fp8", 0.03, {"kv_cache_dtype": "fp8"}),
    "NVFP4, FP8 KV": Case("llama4-tiny-a/nvfp4", 0.03, {"kv_cache_dtype": "fp8"}),
}
Ids = dict[str, list[int]]


def prompts_of(case: Case) -> dict[str, list[int]]:
    """Short texts for the embedded model, random ids around the chunk's borders for Llama 4."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no {FIXTURES}: set OUTRIDER_SHARED")
    if not case.folder:
        entries = json.loads((FIXTURES / "smollm2_greedy.json").read_text())["prompts"]
        return {f"p{i}": entry["prompt_ids"] for i, entry in enumerate(entries)}
    rng = random.Random(4)
    lengths = (1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 6, 4 * CHUNK + 22)
    return {f"p{n}": [rng.randrange(990) for _ in range(n)] for n in lengths}


def request(name: str, ids: list[int], max_tokens: int = 20) -> Request:
    """A greedy request that reports the two best values of each step."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=2)
    return Request(request_id=name, prompt_token_ids=ids, sampling=sampling)


@contextmanager
def engine_of(case: Case, **changes: Any) -> Iterator[Engine]:
    """The real engine; its ledger is checked and its ranks are ended afterwards."""
    settings: dict[str, Any] = {
        "max_model_len": 192,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 1 << 26,
        "device": "cpu",
        **case.settings,
        **changes,
    }
    engine, _ = build_engine(EngineConfig(model=case.path, **settings), lambda *_: None)
    try:
        yield engine
        engine.scheduler.check_integrity()
        assert engine.scheduler.kv.pool.num_used == 0
    finally:
        engine.shutdown()


def run(engine: Engine, requests: list[Request]) -> tuple[Ids, dict[str, list[float]]]:
    """``(ids, margins)`` of every request after all have ended."""
    ids: Ids = {r.request_id: [] for r in requests}
    margins: dict[str, list[float]] = {r.request_id: [] for r in requests}
    for r in requests:
        assert not engine.add(r)
    while engine.has_work:
        for event in engine.step():
            assert event.finish_reason != "error", event.error
            ids[event.request_id] += event.token_ids
            for entry in event.logprobs or []:
                margins[event.request_id].append(entry.top_logprobs[0] - entry.top_logprobs[1])
    return ids, margins


@dataclass(frozen=True)
class Baseline:
    """What every variant is compared with."""

    case: Case
    prompts: dict[str, list[int]]
    ids: Ids
    margins: dict[str, list[float]]

    def check(self, ids: Ids) -> None:
        """Every id before the first close step is equal, and most steps are compared at all."""
        compared = 0
        for name, want in self.ids.items():
            close = [i for i, margin in enumerate(self.margins[name]) if margin < self.case.margin]
            count = close[0] if close else len(want)
            assert ids[name][:count] == want[:count], name
            compared += count
        assert compared > 0.5 * sum(map(len, self.ids.values()))

    def requests(self) -> list[Request]:
        """The prompts as requests."""
        return [request(name, ids) for name, ids in self.prompts.items()]


@pytest.fixture(scope="module", params=CASES)
def base(request: pytest.FixtureRequest) -> Baseline:
    """Each prompt alone, in one piece, plain."""
    case = CASES[request.param]
    prompts = prompts_of(case)
    ids: Ids = {}
    margins: dict[str, list[float]] = {}
    with engine_of(case, async_scheduling=False, enable_prefix_caching=False) as engine:
        for one in Baseline(case, prompts, {}, {}).requests():
            got = run(engine, [one])
            ids |= got[0]
            margins |= got[1]
    return Baseline(case, prompts, ids, margins)


@pytest.mark.parametrize(
    ("budget", "overlapped"),
    [(1, True), (7, False), (7, True)],
    ids=["1, overlapped", "7, plain", "7, overlapped"],
)
def test_chunks_of_the_prefill(base: Baseline, budget: int, overlapped: bool) -> None:
    """Guards positions, chunk borders and masks when a prompt is computed in pieces of 1 or 7 tokens."""
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": budget, "async_scheduling": overlapped}
    with engine_of(base.case, **settings, enable_prefix_caching=False) as engine:
        base.check(run(engine, base.requests())[0])


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_company_of_32(base: Baseline, overlapped: bool) -> None:
    """Guards rows, block tables and sampling of a full batch: neighbours of other lengths that come and go."""
    rng = random.Random(overlapped)
    others = [
        request(f"other{i}", [rng.randrange(900) for _ in range(rng.randint(1, 60))], rng.randint(1, 12))
        for i in range(32 - len(base.prompts))
    ]
    mixed = base.requests() + others
    rng.shuffle(mixed)
    with engine_of(base.case, async_scheduling=overlapped) as engine:
        base.check(run(engine, mixed)[0])


def test_prefix_hit_or_miss(base: Baseline) -> None:
    """Guards cached blocks: the second round finds its prompts and must not see anybody else's keys and values."""
    with engine_of(base.case) as engine:
        base.check(run(engine, base.requests())[0])
        before = engine.stats().cached_prompt_tokens
        base.check(run(engine, base.requests())[0])
        assert engine.stats().cached_prompt_tokens - before >= 16
        # Past the prompt: what was generated is cached too.
        longest = max(base.prompts, key=lambda name: len(base.prompts[name]))
        ids, margins = base.ids[longest], base.margins[longest]
        longer = request("longer", base.prompts[longest] + ids[:10], 10)
        if min(margins) > base.case.margin:
            assert run(engine, [longer])[0]["longer"] == ids[10:20]


@pytest.mark.parametrize("overlapped", [False, True], ids=["plain", "overlapped"])
def test_preempted_and_resumed(base: Baseline, overlapped: bool) -> None:
    """Guards recompute after preemption: a pool for little more than one sequence, ends that are underestimated."""
    blocks = base.case.few_blocks
    with engine_of(base.case, num_gpu_blocks_override=blocks, async_scheduling=overlapped) as engine:
        for _ in range(600):
            engine.scheduler.starts.estimator.observe(1)
        base.check(run(engine, base.requests())[0])
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("kind", ["TP", "PP"])
@pytest.mark.parametrize(
    "overlapped", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "overlapped"]
)
def test_several_ranks(base: Baseline, kind: str, overlapped: bool) -> None:
    """Guards sharding and stages: processes over gloo, layers split by columns or by depth."""
    split = (
        {"tensor_parallel_size": base.case.tensor_ranks} if kind == "TP" else {"pipeline_parallel_size": 2}
    )
    with engine_of(base.case, async_scheduling=overlapped, **split) as engine:
        base.check(run(engine, base.requests())[0])
