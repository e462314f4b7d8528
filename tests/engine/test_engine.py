"""The engine against a fake model whose output depends on every block: scheduling must never change a token."""

from __future__ import annotations

import random
import time

import msgspec
import pytest

from outrider.engine.admission import OutputEstimator
from outrider.engine.engine import Engine
from outrider.engine.kv_manager import KVManager
from outrider.engine.scheduler import Limits, Scheduler
from outrider.kv_layout import KVLayout, plan_layout
from outrider.types import STEP_TOKEN_BUCKETS, Request, SamplingParams, TokenEvent, TokenLogprobs
from tests.engine.fake_executor import FakeExecutor, expected_ids

FULL = plan_layout((False,) * 4, None, 256, 4)
CHUNKED = plan_layout((True, True, True, False), 16, 256, 4)
ODD_CHUNK = plan_layout((True, True, True, False), 10, 256, 4)


def make_engine(
    layout: KVLayout,
    num_blocks: int,
    *,
    rows: int = 8,
    budget: int = 32,
    share: int = 16,
    depth: int = 2,
    prefix: bool = True,
) -> Engine:
    executor = FakeExecutor(layout, num_blocks, rows, 256)
    scheduler = Scheduler(KVManager(layout, num_blocks, prefix), Limits(rows, budget, share))
    return Engine(scheduler, executor, None, depth)


def request(name: str, prompt: list[int], max_tokens: int, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)  # type: ignore[arg-type]
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params)


def run(engine: Engine, requests: list[Request], limit: int = 20000) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for r in requests:
        collect(out, engine.add(r))
    for _ in range(limit):
        if not engine.has_work:
            break
        collect(out, engine.step())
    assert not engine.has_work, "the engine did not come to an end"
    engine.scheduler.check_integrity()
    return out


def collect(out: dict[str, list[int]], events: list[TokenEvent]) -> None:
    for event in events:
        assert event.finish_reason != "error", event.error
        out[event.request_id] += event.token_ids


def prompts(count: int, rng: random.Random, longest: int = 60) -> list[list[int]]:
    return [[rng.randrange(997) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("layout", [FULL, CHUNKED, ODD_CHUNK], ids=["full", "chunked", "odd-chunk"])
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("budget", [8, 15, 256])
def test_ids_do_not_depend_on_scheduling(layout: KVLayout, depth: int, budget: int) -> None:
    """Chunk size, overlap, company and a pool that forces preemption leave every id as it is."""
    rng = random.Random(budget * depth)
    requests = [request(f"r{i}", p, rng.randint(1, 30), seed=0) for i, p in enumerate(prompts(24, rng))]
    for num_blocks in (100, 2000):
        engine = make_engine(layout, num_blocks, budget=budget, share=max(1, budget // 2), depth=depth)
        out = run(engine, requests)
        for r in requests:
            want = expected_ids(r.prompt_token_ids, r.sampling.max_tokens, layout)
            assert out[r.request_id] == want, f"{r.request_id} with {num_blocks} blocks"


@pytest.mark.parametrize("layout", [FULL, CHUNKED, ODD_CHUNK], ids=["full", "chunked", "odd-chunk"])
def test_prefix_hits_change_nothing_but_the_work(layout: KVLayout) -> None:
    """A second, equal prompt computes fewer tokens and gives the same ids."""
    rng = random.Random(5)
    prompt = [rng.randrange(997) for _ in range(57)]
    engine = make_engine(layout, 400)
    first = run(engine, [request("a", prompt, 9)])["a"]
    computed = engine.stats().prompt_tokens
    second = run(engine, [request("b", prompt, 9)])["b"]
    longer = run(engine, [request("c", prompt + first, 9)])["c"]
    assert first == second == expected_ids(prompt, 9, layout)
    assert longer == expected_ids(prompt + first, 9, layout)
    assert engine.stats().prompt_tokens - computed < len(prompt) + len(prompt)
    assert engine.stats().cached_prompt_tokens >= 2 * 56 - 8


def test_salt_separates_prefix_caches() -> None:
    """Tenants with different salts must not learn from timing what others asked."""
    engine = make_engine(FULL, 400)
    prompt = list(range(40))
    params = SamplingParams(max_tokens=2, temperature=0.0)
    for name, salt in (("a", "x"), ("b", "y")):
        run(engine, [Request(request_id=name, prompt_token_ids=prompt, sampling=params, cache_salt=salt)])
    assert engine.stats().cached_prompt_tokens == 0


def test_preemption_happens_and_is_harmless() -> None:
    """Underestimated outputs must end in preemption, never in a deadlock or a wrong id."""
    rng = random.Random(3)
    requests = [request(f"r{i}", p, 60, seed=i) for i, p in enumerate(prompts(12, rng, 20))]
    engine = make_engine(FULL, 80)
    engine.scheduler.starts.estimator._mean = 1.0
    out = run(engine, requests)
    assert engine.stats().preemptions > 0
    for r in requests:
        assert out[r.request_id] == expected_ids(r.prompt_token_ids, 60, FULL)


@pytest.mark.parametrize("wait", range(10, 60, 7))
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "overlapped"])
def test_a_preempted_prompt_has_each_logprob_once(depth: int, wait: int) -> None:
    """Guards: entries twice or lost, where a slice of the prompt is in flight as its blocks are taken."""
    num_preempted = 0
    for share, mean in ((4, 2.0), (8, 4.0), (16, 16.0)):
        engine = make_engine(FULL, 41, budget=64, share=share, depth=depth, prefix=False)
        engine.scheduler.starts.estimator = OutputEstimator(mean)  # too low for those that run
        for i in range(3):
            engine.add(request(f"r{i}", list(range(8)), 100))
        for _ in range(wait):
            engine.step()
        prompt = list(range(100, 170))
        engine.add(request("asks", prompt, 2, prompt_logprobs=0))
        entries: list[TokenLogprobs | None] = []
        while engine.has_work:
            for event in engine.step():
                entries += event.prompt_logprobs or []
        assert [entry and entry.token_id for entry in entries] == [None, *prompt[1:]]
        num_preempted += engine.stats().preemptions
    assert num_preempted > 0


def test_exact_lookahead_never_preempts() -> None:
    """With ``ignore_eos`` every end is known, so admission leaves nothing to preemption."""
    rng = random.Random(4)
    requests = [request(f"r{i}", p, 40, ignore_eos=True) for i, p in enumerate(prompts(40, rng))]
    engine = make_engine(FULL, 120, rows=32)
    run(engine, requests)
    assert engine.stats().preemptions == 0


def test_local_layers_hold_one_chunk() -> None:
    """A prompt far beyond the chunk costs what the full layers cost plus one chunk."""
    layout = plan_layout((True, True, True, False), 16, 256, 4)
    engine = make_engine(layout, 400, budget=256, share=256, prefix=False)
    engine.add(request("a", list(range(200)), 20))
    peak = 0
    while engine.has_work:
        engine.step()
        peak = max(peak, engine.stats().kv_blocks_used)
    assert peak <= 220 // 4 + 3 * (16 // 4)


@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "overlapped"])
@pytest.mark.parametrize("layout", [FULL, CHUNKED], ids=["full", "chunked"])
def test_random_arrivals_and_aborts(depth: int, layout: KVLayout) -> None:
    """2,000 arrivals and aborts on a tiny pool: no deadlock, no leaked block, right ids for the survivors."""
    rng = random.Random(depth)
    engine = make_engine(layout, 60, rows=6, depth=depth)
    engine.scheduler.starts.estimator._mean = 4.0
    live: dict[str, Request] = {}
    out: dict[str, list[int]] = {}
    done = aborted = 0
    for i in range(2000):
        r = request(f"r{i}", prompts(1, rng, 40)[0], rng.randint(1, 24), seed=i)
        live[r.request_id], out[r.request_id] = r, []
        events = engine.add(r)
        for _ in range(rng.randint(0, 6)):
            events += engine.step()
        if rng.random() < 0.3 and live:
            victim = rng.choice(list(live))
            events += engine.abort(victim)
            aborted += 1
        collect(out, events)
        for event in events:
            if event.finish_reason is not None:
                ended = live.pop(event.request_id)
                if event.finish_reason == "length":
                    done += 1
                    want = expected_ids(ended.prompt_token_ids, ended.sampling.max_tokens, layout)
                    assert out[event.request_id] == want
        if i % 100 == 0:
            engine.scheduler.check_integrity()
    for _ in range(100000):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work
    engine.scheduler.check_integrity()
    assert engine.scheduler.kv.pool.num_used == 0
    assert done > 500 and aborted > 300


def test_a_request_that_never_fits_is_refused_alone() -> None:
    """One oversized request must not block those behind it."""
    engine = make_engine(FULL, 10)
    events = engine.add(request("big", list(range(100)), 20))
    assert events[0].finish_reason == "error" and "max_tokens" in (events[0].error or "")
    assert run(engine, [request("small", [1, 2, 3], 4)])["small"] == expected_ids([1, 2, 3], 4, FULL)


def test_eos_and_min_tokens_end_a_sequence() -> None:
    """An end token finishes the sequence with the reason OpenAI clients read, and not before ``min_tokens``."""
    ids = expected_ids([7, 8, 9], 12, FULL)
    engine = make_engine(FULL, 100)
    engine.add(request("a", [7, 8, 9], 12, eos_token_ids=(ids[4], ids[6])))
    events = [e for _ in range(50) for e in engine.step()]
    assert [t for e in events for t in e.token_ids] == ids[:5]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", None)
    engine.add(request("b", [7, 8, 9], 12, eos_token_ids=(ids[4], ids[6]), min_tokens=6))
    events = [e for _ in range(50) for e in engine.step()]
    assert [t for e in events for t in e.token_ids] == ids[:7]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", ids[6])
    engine.scheduler.check_integrity()


def test_queue_time_and_step_sizes() -> None:
    """Guards the queue time of a request that waits for a row, and the count of steps by their tokens."""
    engine = make_engine(FULL, 100, rows=1, budget=20)
    now = time.monotonic()
    queued: dict[str, list[float]] = {}
    for name in ("a", "b"):
        wanted = msgspec.structs.replace(request(name, [5] * 33, 4), arrival_s=now)
        assert not engine.add(wanted)
    while engine.has_work:
        time.sleep(0.001)
        for event in engine.step():
            queued.setdefault(event.request_id, []).append(event.queue_s)
    assert 0 < queued["a"][0] < queued["b"][0] <= time.monotonic() - now
    assert queued["b"][0] > 0.004 and not any(queued["a"][1:] + queued["b"][1:])
    stats = engine.stats()
    counts = dict(zip([*STEP_TOKEN_BUCKETS, None], stats.step_token_counts, strict=True))
    assert sum(stats.step_token_counts) == stats.steps
    assert (
        stats.step_tokens_sum == stats.prompt_tokens + stats.generation_tokens - 2
    )  # none after the last token
    assert counts[1] >= 6 and counts[32] >= 1 and counts[None] == 0
