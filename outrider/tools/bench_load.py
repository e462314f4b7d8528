"""The load of ``bench serve``: when each request leaves, how many are in flight, and what came back.

``run_load`` sends every prompt once and returns one ``RequestRecord`` each, in the order of the prompts.
Waiting for a free slot of ``--max-concurrency`` is not part of a request's time. Computes no statistics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from outrider.tools.bench_client import RequestRecord, StreamClient
from outrider.tools.bench_datasets import Prompt


@dataclass(frozen=True)
class Target:
    """Which server and route, and the fields every request carries besides prompt and length."""

    base_url: str
    path: str
    model: str
    chat: bool
    headers: Mapping[str, str] = field(default_factory=dict)
    insecure: bool = False
    request_id_prefix: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def request_headers(self, index: int) -> dict[str, str]:
        """Headers of request ``index`` beside the common ones."""
        return {"x-request-id": f"{self.request_id_prefix}{index}"} if self.request_id_prefix else {}

    def body(self, prompt: Prompt) -> bytes:
        """The JSON body for ``prompt``: a streamed request with usage in the last chunk."""
        if self.chat:
            content = [{"type": "text", "text": prompt.text}]
            fields: dict[str, Any] = {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "max_completion_tokens": prompt.output_len,
            }
        else:
            fields = {
                "model": self.model,
                "prompt": prompt.text,
                "max_tokens": prompt.output_len,
                "repetition_penalty": 1.0,
            }
        fields |= {"stream": True, "stream_options": {"include_usage": True}, **self.extra}
        return msgspec.json.encode(fields)


@dataclass(frozen=True)
class Schedule:
    """Request rate in 1/s (inf: all at once), burstiness (gamma shape), ramp as (strategy, start, end)."""

    request_rate: float = float("inf")
    burstiness: float = 1.0
    ramp: tuple[str, float, float] | None = None
    max_concurrency: int | None = None
    seed: int = 0

    def rate_at(self, index: int, count: int) -> float:
        """Configured rate (1/s) when request ``index`` of ``count`` leaves."""
        if self.ramp is None:
            return self.request_rate
        strategy, start, end = self.ramp
        progress = index / max(count - 1, 1)
        if strategy == "linear":
            return start + (end - start) * progress
        return float(start * (end / start) ** progress)

    def send_times(self, count: int) -> np.ndarray:
        """Seconds after the start at which each of ``count`` requests leaves, [count] float64, ascending.

        Gaps follow a gamma law of mean 1/rate and shape ``burstiness`` (1: Poisson, inf: constant).
        At a constant rate they are rescaled to end at count / rate: the luck of the draw does not change it.
        """
        rates = np.array([self.rate_at(index, count) for index in range(count)])
        if np.isinf(rates).all():
            return np.zeros(count)
        if np.isinf(self.burstiness):
            gaps = 1.0 / rates
        else:
            rng = np.random.default_rng(self.seed)
            gaps = rng.gamma(self.burstiness, 1.0 / (rates * self.burstiness))
        times = np.cumsum(gaps)
        return times * (count / self.request_rate / times[-1]) if self.ramp is None else times


@dataclass
class Progress:
    """Live counters for the progress bar; ``run_load`` is the only writer."""

    total: int
    started: int = 0
    finished: int = 0
    failed: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class LoadResult:
    """Records in prompt order; ``start`` and ``duration_s`` span the first send and the last finish."""

    records: list[RequestRecord]
    start: float
    duration_s: float


async def run_load(
    target: Target,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    on_start: Callable[[Progress], None] | None = None,
) -> LoadResult:
    """Send all prompts by the schedule and wait for every answer."""
    client = StreamClient(target.base_url, target.headers, insecure=target.insecure)
    slots = asyncio.Semaphore(schedule.max_concurrency or len(prompts))
    progress = Progress(total=len(prompts))
    # Bodies are encoded beforehand: with 512 first requests at once it would delay the later ones.
    bodies = [target.body(prompt) for prompt in prompts]
    if on_start is not None:
        on_start(progress)

    async def one(index: int) -> RequestRecord:
        async with slots:
            progress.started += 1
            headers = (
                {"x-request-id": f"{target.request_id_prefix}{index}"} if target.request_id_prefix else {}
            )
            record = await client.stream(target.path, bodies[index], headers)
            progress.finished += 1
            progress.failed += not record.success
            progress.output_tokens += record.output_tokens or len(record.chunk_times)
            return record

    start = time.perf_counter()
    tasks = []
    for index, send_time in enumerate(schedule.send_times(len(prompts))):
        delay = start + float(send_time) - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(one(index)))
    records = list(await asyncio.gather(*tasks))
    duration = time.perf_counter() - start
    client.close()
    return LoadResult(records, start, duration)


async def send_one(target: Target, prompt: Prompt) -> RequestRecord:
    """One request outside the measurement: the ready check and warm-ups."""
    return (await run_load(target, [prompt], Schedule())).records[0]
