"""An engine process whose device is a clock: the scheduler, the index arrays and the messages are real.

Put in place of the model by ``benchmarks.host`` (through a ``sitecustomize`` on the server's path). A step takes
``$HOST_STEP_MS`` on the pretended device, which works on one step after the other; ids are drawn at random. When the
engine ends, ``$HOST_RECORDS`` gets a JSON list of ``[monotonic s, engine thread CPU s, process CPU s, idle s of the
device before this step, tokens]``, one entry a launched step.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.executor import StepHandle
from outrider.engine.kv_manager import KVManager
from outrider.engine.messages import Events, encode_frame
from outrider.engine.plan import Plan
from outrider.engine.scheduler import Limits, Scheduler
from outrider.kv_layout import KVLayout, plan_layout
from outrider.runner.padding import ShapeTable, pad
from outrider.runner.rows import RowTable
from outrider.startup import settle_heap
from outrider.types import EngineInfo, Request, SamplingParams, StepPlan, StepResult

NUM_ROWS = 512
MAX_MODEL_LEN = 9216
BLOCK_SIZE = 64
LAYERS = 48
FIRST_ID, LAST_ID = 1000, 40000
"""Ordinary words of the embedded model's vocabulary."""


class ClockStep:
    """A launched step: its ids exist when the device's clock says so."""

    def __init__(self, result: StepResult, done_s: float) -> None:
        self._result = result
        self._done_s = done_s

    def wait(self) -> StepResult:
        """Sleep until the device would be done."""
        rest = self._done_s - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        return self._result


class ClockDevice:
    """An executor that does the host's part of a launch and computes nothing."""

    def __init__(self, layout: KVLayout, step_s: float, records: Path | None) -> None:
        self._table = RowTable(layout, NUM_ROWS, MAX_MODEL_LEN)
        self._shapes = ShapeTable(NUM_ROWS, 512)
        self._num_blocks = -(-MAX_MODEL_LEN // layout.block_size)
        self._rng = np.random.default_rng(0)
        self._step_s = step_s
        self._free_s = 0.0
        self._path = records
        self._records: list[tuple[float, float, float, float, int]] = []

    def launch(self, plan: StepPlan) -> ClockStep:
        """Rows, index arrays and padding as the runner makes them; then the clock."""
        self._table.apply(plan)
        arrays = self._table.arrays(plan.slices)
        shape = self._shapes.shape_of(arrays)
        if shape is not None:
            arrays = pad(arrays, shape, self._num_blocks, MAX_MODEL_LEN)
        self._table.sampling_arrays(arrays.sample_rows, arrays.output_index)
        count = len(arrays.sample_rows)
        ids = self._rng.integers(FIRST_ID, LAST_ID, count).tolist()
        now = time.monotonic()
        idle = max(0.0, now - self._free_s)
        self._records.append((now, time.thread_time(), time.process_time(), idle, count))
        self._free_s = max(now, self._free_s) + self._step_s
        return ClockStep(StepResult(plan.step_id, ids, [None] * count), self._free_s)

    def shutdown(self) -> None:
        """Write what was recorded."""
        if self._path is not None:
            self._path.write_text(json.dumps(self._records))


def scout_layout() -> KVLayout:
    """How Scout's 48 layers share the cache at the recipe's context length: one full and three chunked groups."""
    rope = tuple((i + 1) % 4 != 0 for i in range(LAYERS))
    return plan_layout(rope, 8192, MAX_MODEL_LEN, BLOCK_SIZE)


def build_engine(
    config: EngineConfig, on_progress: Callable[[str, int, int], None], step_s: float | None = None
) -> tuple[Engine, EngineInfo]:
    """Stands in for ``runner.setup.build_engine``; ``step_s`` None takes ``$HOST_STEP_MS``."""
    if step_s is None:
        step_s = float(os.environ["HOST_STEP_MS"]) / 1e3
    layout = scout_layout()
    num_blocks = NUM_ROWS * len(layout.groups) * (4096 // BLOCK_SIZE)
    records = os.environ.get("HOST_RECORDS")
    device = ClockDevice(layout, step_s, Path(records) if records else None)
    scheduler = Scheduler(KVManager(layout, num_blocks, False), Limits(NUM_ROWS, 8192, 512))
    info = EngineInfo(
        model=config.model,
        architecture="clock",
        device="a clock",
        dtype="none",
        quantization="none",
        kv_cache_dtype="none",
        kernels={},
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        kv_capacity_tokens=num_blocks // len(layout.groups) * BLOCK_SIZE,
        max_concurrency=float(NUM_ROWS),
        max_num_seqs=NUM_ROWS,
    )
    return Engine(scheduler, device, None, depth=2), info


def step_costs(num_streams: int, num_steps: int, pause_s: float) -> dict[str, dict[str, float]]:
    """CPU milliseconds of a decode step's parts, with the engine alone in this process: least and median.

    Between two steps the thread sleeps, as it does while a device works, so caches are as cold as in a server.
    """
    engine, _ = build_engine(EngineConfig(model="clock"), lambda *_: None, step_s=0.0)
    for index in range(num_streams):
        params = SamplingParams(max_tokens=2 * num_steps + 100, temperature=0.0, ignore_eos=True)
        engine.add(Request(request_id=f"cmpl-{index:032x}-0-0", prompt_token_ids=[5] * 32, sampling=params))
    costs: dict[str, list[float]] = {name: [] for name in ("schedule", "launch", "commit", "message", "step")}
    in_flight: list[tuple[Plan, StepHandle]] = []
    settle_heap()
    while len(costs["step"]) < num_steps:
        clock = [time.thread_time()]
        plan = engine.scheduler.schedule()
        clock.append(time.thread_time())
        assert plan is not None
        in_flight.append((plan, engine.executor.launch(plan.step)))
        clock.append(time.thread_time())
        oldest, handle = in_flight[0]
        events = engine.scheduler.commit(oldest, handle.wait()) if len(in_flight) == 2 else []
        clock.append(time.thread_time())
        encode_frame(Events(events, engine.stats(), True))
        clock.append(time.thread_time())
        del in_flight[:-1]
        if len(plan.step.slices) == len(events) == num_streams:
            parts = [after - before for before, after in pairwise(clock)]
            for name, seconds in zip(costs, [*parts, sum(parts)], strict=True):
                costs[name].append(seconds * 1e3)
            time.sleep(pause_s)
    return {
        name: {"least": round(min(ms), 3), "median": round(statistics.median(ms), 3)}
        for name, ms in costs.items()
    }


def install() -> None:
    """Replace the engine process's way to a model."""
    import outrider.runner.setup as setup

    setup.build_engine = build_engine
