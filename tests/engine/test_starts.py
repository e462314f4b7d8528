"""When waiting requests start: spread over time, held back for a last wave, never for ever."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from outrider.engine.admission import Holdings, steps_until_room
from outrider.engine.kv_manager import KVManager
from outrider.engine.plan import Plan
from outrider.engine.scheduler import Limits, Scheduler
from outrider.engine.starts import LAST_WAVE_SHARES, LAST_WAVE_TOKENS, Pacer, Starts, wave_share
from outrider.kv_layout import plan_layout
from outrider.types import EngineStats, Request, SamplingParams, StepResult

FULL = plan_layout((False,) * 4, None, 4096, 16)
WIDE = plan_layout((False,) * 4, None, 65536, 64)


def step(scheduler: Scheduler) -> Plan:
    """Plan and commit one step, and return it; no token is the last of its sequence unless by length."""
    plan = scheduler.schedule()
    assert plan is not None, "there is work, and no step"
    count = sum(piece.samples for piece in plan.step.slices)
    scheduler.commit(plan, StepResult(plan.step.step_id, [5] * count, [None] * count, {}))
    return plan


def request(name: str) -> Request:
    """64 tokens in, 256 out: 20 blocks at the end."""
    params = SamplingParams(max_tokens=256, temperature=0.0, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=[1] * 64, sampling=params)


def room_for(count: int, **changes: float) -> Scheduler:
    """A scheduler with blocks for the ends of so many requests; ``changes`` of its ``Starts``."""
    scheduler = Scheduler(KVManager(FULL, 20 * count + 1, False), Limits(512, 1024, 64))
    scheduler.starts = Starts(scheduler.kv, 64, 512, **changes)
    return scheduler


def test_starts_are_spread_at_the_rate_that_the_pool_sustains() -> None:
    """Starts that come in a burst end in one, with a quarter of the pool kept empty until then."""
    pacer, times = Pacer(1000), []
    for now in range(1000):
        pacer.next_step()
        while pacer.may_start:
            pacer.pay(40 * 250)
            times.append(now)
    gaps = np.diff(times)
    assert gaps.max() - gaps.min() <= 1, "the starts are even"
    assert len(times) * 40 * 250 == pytest.approx(1000 * 1000, rel=0.02), "and fill the pool"


class Eager(Pacer):
    """Starts that wait for nothing but memory."""

    may_start = True  # type: ignore[assignment]


def steps_of_short_answers(pacer: type[Pacer]) -> int:
    """Steps until 150 requests are through that may generate 512 tokens and all end after 24."""
    scheduler = Scheduler(KVManager(FULL, 120, False), Limits(64, 256, 128))
    scheduler.starts._pacer = pacer(scheduler.kv.pool.capacity)
    for i in range(150):
        params = SamplingParams(max_tokens=512, eos_token_ids=(9,))
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=[1] * 48, sampling=params))
    steps = 0
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        ids = [
            9 if seq.num_outputs == 24 else 5
            for seq, piece in zip(plan.sequences, plan.step.slices, strict=True)
            if piece.samples
        ]
        scheduler.commit(plan, StepResult(plan.step.step_id, ids, [None] * len(ids), {}))
        steps += 1
    return steps


def test_answers_shorter_than_expected_do_not_slow_the_starts() -> None:
    """A start paid with the expected length and never refunded leaves most of the pool empty."""
    assert steps_of_short_answers(Pacer) <= 1.1 * steps_of_short_answers(Eager)


def test_answers_longer_than_expected_do_not_stop_those_that_come_later() -> None:
    """What they took is over with: charged to the next requests, it would leave the pool to one of them at a time."""
    scheduler = room_for(150, patience=math.inf)
    for i in range(10):
        params = SamplingParams(max_tokens=3000, eos_token_ids=(9,))
        scheduler.add(Request(request_id=f"l{i}", prompt_token_ids=[1] * 64, sampling=params))
    while scheduler.has_work:
        step(scheduler)
    for i in range(200):
        scheduler.add(request(f"r{i}"))
    for _ in range(200):
        step(scheduler)
    assert scheduler.update_stats().num_running > 20


def test_a_start_is_paid_once() -> None:
    """Guards: a request that was preempted in its prompt and pays, or waits for its turn, a second time."""
    paid: list[int] = []

    class Counting(Pacer):
        def pay(self, area: int) -> None:
            paid.append(area)
            super().pay(area)

    scheduler = room_for(10)
    scheduler.starts._pacer = Counting(scheduler.kv.pool.capacity)
    params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    scheduler.add(request("first"))
    scheduler.add(Request(request_id="long", prompt_token_ids=[1] * 1500, sampling=params))
    step(scheduler)
    last = scheduler._queues.running[-1]
    assert last.request.request_id == "long" and not last.num_outputs
    scheduler._preempt(last)
    step(scheduler)
    assert scheduler.update_stats().num_running == 2 and len(paid) == 2


def counted_wait(running: Holdings, group: Holdings, capacity: int) -> float:
    """The first step at which the group can start and nothing ever exceeds the capacity, found by trying."""
    horizon = int(running.steps.max() + group.steps[0]) + 2
    times = np.arange(horizon)[:, None]
    growth = (running.at_end - running.held) / running.steps
    used = np.where(times <= running.steps, running.held + growth * times, 0).sum(1)
    own = group.held[0] + (group.at_end[0] - group.held[0]) / group.steps[0] * np.arange(
        int(group.steps[0]) + 1
    )
    for wait in range(int(running.steps.max()) + 2):
        total = np.concatenate((used, np.zeros(len(own))))
        total[wait : wait + len(own)] += own * len(group.steps)
        if total.max() <= capacity + 1e-6:
            return wait
    return math.inf


def test_the_wait_for_a_common_start_is_the_shortest() -> None:
    """Too short and the last of them find no room; too long and memory is idle."""
    rng, finite = np.random.default_rng(3), 0
    for _ in range(300):
        count = int(rng.integers(1, 12))
        held = rng.integers(1, 40, count).astype(float)
        steps = rng.integers(1, 100, count).astype(float)
        running = Holdings(held, held + rng.integers(0, 40, count), steps)
        group = Holdings.of_equals(
            int(rng.integers(1, 20)), int(rng.integers(20, 60)), 100, int(rng.integers(1, 9))
        )
        capacity = int(running.at_end.sum() * rng.uniform(0.9, 2.0))
        expected, got = counted_wait(running, group, capacity), steps_until_room(running, group, capacity)
        assert math.isinf(got) == math.isinf(expected)
        if math.isfinite(expected):
            finite += 1
            assert abs(math.ceil(got - 1e-6) - expected) <= 1, "the counted steps are whole"
    assert finite > 100


def steps_until_through(count: int, room: int, **changes: float) -> int:
    """Steps for a queue that comes at once."""
    scheduler = room_for(room, **changes)
    for i in range(count):
        scheduler.add(request(f"r{i}"))
    num_steps = 0
    while scheduler.has_work:
        step(scheduler)
        num_steps += 1
    scheduler.check_integrity()
    assert scheduler.stats.preemptions == 0
    return num_steps


def test_the_last_wave_starts_together() -> None:
    """A queue a little larger than fits is through in a little more than one life of a request."""
    planned = steps_until_through(64, 60)
    spread = steps_until_through(64, 60, patience=math.inf)
    assert planned < 0.88 * spread, f"{planned} steps, {spread} without a plan"


@pytest.mark.parametrize(
    ("room", "count"),
    [(60, count) for count in (61, 64, 80, 100, 119, 120, 150, 200, 400)]
    + [(10, 15), (10, 23), (20, 29), (20, 49), (40, 57), (40, 105)],
)
def test_a_plan_never_takes_much_longer_than_even_starts(room: int, count: int) -> None:
    """Whatever the length of the queue: the last requests must not be left over for a wave of their own."""
    planned = steps_until_through(count, room)
    spread = steps_until_through(count, room, patience=math.inf)
    assert planned <= 1.04 * spread


def steps_of_lengths(lengths: list[tuple[int, int]], pacer: type[Pacer]) -> int:
    """Steps until requests of these prompts and outputs are through; the queue is never planned."""
    scheduler = room_for(60, patience=math.inf)
    scheduler.starts._pacer = pacer(scheduler.kv.pool.capacity)
    for i, (prompt, outputs) in enumerate(lengths):
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=[1] * prompt, sampling=params))
    num_steps = 0
    while scheduler.has_work:
        step(scheduler)
        num_steps += 1
    return num_steps


def test_requests_of_unlike_length_start_as_soon_as_they_fit() -> None:
    """They do not end together, so nothing is gained by spreading their starts."""
    rng = random.Random(0)
    lengths = [(rng.randrange(8, 120), rng.randrange(20, 500)) for _ in range(200)]
    assert steps_of_lengths(lengths, Pacer) <= 1.06 * steps_of_lengths(lengths, Eager)


def test_short_requests_between_long_ones_do_not_count() -> None:
    """The pool is the long ones', which are alike and would end together."""
    lengths = [(64, 600) if i % 2 else (16, 16) for i in range(120)]
    assert steps_of_lengths(lengths, Pacer) <= 0.9 * steps_of_lengths(lengths, Eager)


def waiting_for_a_wave(count: int, room: int) -> Scheduler:
    """A scheduler that computes the prompts of its last requests while they wait to start together."""
    scheduler = room_for(room)
    for i in range(count):
        scheduler.add(request(f"r{i}"))
    while scheduler._queues.waiting:
        step(scheduler)
        assert not scheduler.starts._is_last_wave, "the wave came before its prompts were ready"
    while any(seq.remaining > 1 for seq in scheduler._queues.held):
        step(scheduler)
    return scheduler


def test_prompts_are_ready_when_their_wave_starts() -> None:
    """The wait is used: all but the last token of each prompt is computed, none is sampled, and one step starts all."""
    scheduler = waiting_for_a_wave(85, 60)
    held = list(scheduler._queues.held)
    assert len(held) > 40 and all(seq.num_computed == seq.prompt_len - 1 for seq in held)
    assert scheduler.update_stats().num_waiting == len(held) and not any(seq.num_outputs for seq in held)
    num_steps = 0
    while scheduler._queues.held:
        before = len(scheduler._queues.held)
        plan = step(scheduler)
        num_steps += 1
        assert num_steps < 400
    assert before > 40 and all(piece.num_tokens == 1 for piece in plan.step.slices), "they start in one step"
    while scheduler.has_work:
        step(scheduler)
    scheduler.check_integrity()
    assert scheduler.stats.preemptions == 0


def test_a_wait_ends_with_what_it_waited_for() -> None:
    """Requests that are aborted leave their room at once: nobody waits on for their planned end."""
    scheduler = waiting_for_a_wave(85, 60)
    for seq in scheduler._queues.running[1:]:
        scheduler.abort(seq.request.request_id)
    for _ in range(10):
        step(scheduler)
    assert scheduler.update_stats().num_running > 5


def test_a_request_that_is_aborted_while_it_is_held_leaves_nothing() -> None:
    """Its blocks and its row come back, and the others start without it."""
    scheduler = waiting_for_a_wave(85, 60)
    names = [seq.request.request_id for seq in scheduler._queues.held]
    for name in names[::2]:
        scheduler.abort(name)
    scheduler.check_integrity()
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.kv.pool.num_used == 0 and scheduler.stats.generation_tokens > 256 * len(names[1::2])


def test_running_sequences_take_the_blocks_of_held_ones_first() -> None:
    """Whoever waits has lost least: its prompt is computed again, and nobody's answer stops for it."""
    scheduler = waiting_for_a_wave(85, 60)
    running, youngest = list(scheduler._queues.running), scheduler._queues.held[-1]
    taken = scheduler.kv.pool.try_allocate(scheduler.kv.pool.capacity - scheduler.kv.pool.num_used)
    assert taken is not None
    while not scheduler.stats.preemptions:
        step(scheduler)
    assert youngest is scheduler._queues.waiting[0] and scheduler._queues.running == running
    for block_id in taken:
        scheduler.kv.pool.release(block_id)
    while scheduler.has_work:
        step(scheduler)
    scheduler.check_integrity()
    assert scheduler.stats.generation_tokens == 85 * 256


@pytest.mark.parametrize("prompt_len", [1, 2, 16, 17])
def test_prompts_that_are_cached_or_short_are_held_too(prompt_len: int) -> None:
    """Guards: a row that is taken in a step without a token of its own, which the device then never hears of."""
    scheduler = Scheduler(KVManager(FULL, 17 * 40 + 1, True), Limits(512, 1024, 64))
    params = SamplingParams(max_tokens=256, temperature=0.0, ignore_eos=True)
    for i in range(60):
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=[1] * prompt_len, sampling=params))
    started: set[int] = set()
    while scheduler.has_work:
        plan = step(scheduler)
        started |= {init.row for init in plan.step.new_rows}
        assert {piece.row for piece in plan.step.slices} <= started
    scheduler.check_integrity()
    assert scheduler.stats.generation_tokens == 60 * 256


def test_nobody_is_held_where_priorities_decide() -> None:
    """One that comes later may have to go first, and would find rows and blocks taken."""
    scheduler = Scheduler(KVManager(FULL, 20 * 60 + 1, False), Limits(512, 1024, 64, priority=True))
    for i in range(85):
        scheduler.add(request(f"r{i}"))
    while scheduler.has_work:
        step(scheduler)
        assert not scheduler._queues.held


def test_who_comes_during_the_wait_is_served_too() -> None:
    """Arrivals and aborts at any time change the plan; nobody waits for ever and nobody is preempted."""
    rng = random.Random(5)
    scheduler, num_added, num_steps = room_for(30), 0, 0
    while scheduler.has_work or num_added < 120:
        if num_added < 120 and (num_steps % 90 == 0 or rng.random() < 0.01):
            for _ in range(rng.randrange(1, 40)):
                scheduler.add(request(f"r{num_added}"))
                num_added += 1
        if rng.random() < 0.02:
            scheduler.abort(f"r{rng.randrange(num_added)}")
        if scheduler.has_work:
            step(scheduler)
        num_steps += 1
        assert num_steps < 3000
    scheduler.check_integrity()
    assert scheduler.stats.preemptions == 0


def test_a_closed_loop_is_taken_for_a_queues_end_only_once() -> None:
    """Whoever sends the next request when one ends would otherwise get wave after wave, each half empty in between."""
    scheduler, num_added, num_steps, num_waves = room_for(60), 0, 0, 0
    while scheduler.has_work or num_added < 600:
        while len(scheduler._by_id) < 80 and num_added < 600:
            scheduler.add(request(f"r{num_added}"))
            num_added += 1
        before = scheduler.starts._is_last_wave
        step(scheduler)
        num_steps += 1
        if num_added < 600:
            num_waves += scheduler.starts._is_last_wave and not before
    assert num_waves == 1, "the first 80 could have been all"
    assert num_steps < 2640, (
        "even starts alone take 2,148; one mistake costs a wait and, later, an empty pool"
    )


def steps_in_the_queue(seed: int, **changes: float) -> int:
    """What 60 requests together wait, that come at random, a fifth faster than four at a time can end."""
    rng, scheduler, arrivals = random.Random(seed), room_for(4, **changes), [0.0]
    for _ in range(59):
        arrivals.append(arrivals[-1] + rng.expovariate(1.2 * 4 / 257))
    num_steps = num_waits = num_added = 0
    while num_added < 60 or scheduler.has_work:
        while num_added < 60 and (arrivals[num_added] <= num_steps or not scheduler.has_work):
            scheduler.add(request(f"r{num_added}"))
            num_added += 1
        step(scheduler)
        num_steps += 1
        num_waits += len(scheduler._queues.waiting) + len(scheduler._queues.held)
    return num_waits


def test_random_arrivals_hardly_wait_for_plans() -> None:
    """Each pause would be taken for the queue's end if only arrivals during a last wave counted, not during a wait."""
    planned = sum(steps_in_the_queue(seed) for seed in range(10, 22))
    spread = sum(steps_in_the_queue(seed, patience=math.inf) for seed in range(10, 22))
    assert planned < 1.1 * spread


def test_short_prompts_in_a_small_pool_are_planned_too() -> None:
    """Many start, and end, in one step: what they hold a little longer may be more than the pool."""
    scheduler = Scheduler(KVManager(FULL, 401, False), Limits(512, 1024, 512))
    for i in range(700):
        params = SamplingParams(max_tokens=72, temperature=0.0, ignore_eos=True)
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=[1] * 8, sampling=params))
    while scheduler.has_work:
        step(scheduler)
    scheduler.check_integrity()
    assert scheduler.stats.preemptions == 0


def test_rows_that_bind_before_memory_are_never_held_back() -> None:
    """Guards: a plan for memory that keeps rows free while requests wait."""

    def steps_with(**changes: float) -> int:
        scheduler = Scheduler(KVManager(FULL, 20 * 60 + 1, False), Limits(54, 1024, 64))
        scheduler.starts = Starts(scheduler.kv, 64, 54, **changes)
        for i in range(140):
            scheduler.add(request(f"r{i}"))
        num_steps = 0
        while scheduler.has_work:
            step(scheduler)
            num_steps += 1
        return num_steps

    assert steps_with() <= steps_with(patience=math.inf)


def test_the_usual_share_bounds_a_last_wave() -> None:
    """Whoever asks for a small share asks for short waits between tokens, also at a queue's end."""
    assert wave_share(512, 100) == LAST_WAVE_TOKENS - 100
    assert wave_share(16, 100) == LAST_WAVE_SHARES * 16
    assert wave_share(2048, 100) == 2048


def burst(
    room: int, count: int, prompt_len: int, max_tokens: int, share: int, **changes: float
) -> EngineStats:
    """What became of ``count`` equal requests that came at once, where blocks for the ends of ``room`` are there."""
    kv = KVManager(WIDE, room * -(-(prompt_len + max_tokens) // 64) + 1, False)
    scheduler = Scheduler(kv, Limits(512, 8192, share))
    scheduler.starts = Starts(kv, share, 512, **changes)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    for i in range(count):
        scheduler.add(Request(request_id=f"r{i}", prompt_token_ids=[1] * prompt_len, sampling=params))
    while scheduler.has_work:
        step(scheduler)
    scheduler.check_integrity()
    return scheduler.update_stats()


@pytest.mark.parametrize(
    ("room", "count", "prompt_len", "max_tokens", "share"),
    [
        (6, 18, 64, 50, 512),
        (6, 18, 256, 300, 256),
        (10, 14, 500, 200, 256),
        (10, 28, 500, 200, 512),
        (20, 44, 256, 300, 512),
        (30, 78, 3000, 300, 256),
    ],
)
def test_a_wave_that_starts_before_its_prompts_are_ready(
    room: int, count: int, prompt_len: int, max_tokens: int, share: int
) -> None:
    """Guards: room for prompts of the wait that is still given when the wave runs, and a start that nobody checked."""
    stats = burst(room, count, prompt_len, max_tokens, share)
    assert stats.preemptions == 0 and stats.prompt_tokens == count * prompt_len


@pytest.mark.parametrize(
    ("room", "count", "prompt_len", "max_tokens"),
    [(20, 36, 6000, 500), (30, 60, 3000, 300), (20, 38, 1500, 300), (6, 11, 3000, 500), (40, 61, 3000, 50)],
)
def test_long_prompts_do_not_put_the_first_starts_off(
    room: int, count: int, prompt_len: int, max_tokens: int
) -> None:
    """Answers grow little then: far fewer ends must be spread over the wait than there are requests."""
    planned = burst(room, count, prompt_len, max_tokens, 512)
    spread = burst(room, count, prompt_len, max_tokens, 512, patience=math.inf)
    assert planned.steps <= 1.04 * spread.steps
