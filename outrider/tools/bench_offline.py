"""The engine without HTTP, for ``bench throughput`` and ``bench latency``: start it, feed it, time its tokens.

The engine runs in its own process, as when serving; only the web server and the text layer are left out. Prompts
are token ids. Never imports torch.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import uvloop

from outrider.cli.progress import StartupProgress
from outrider.cli.serve import resolve_files, startup_line
from outrider.config import EngineConfig, ServerConfig
from outrider.engine.client import ProcessEngineClient
from outrider.errors import EngineError
from outrider.tools.bench_client import RequestRecord
from outrider.types import Request, SamplingParams

_T = TypeVar("_T")


@dataclass(frozen=True)
class Work:
    """One sequence to generate: prompt ids and exactly ``output_len`` tokens at ``temperature``."""

    prompt_ids: list[int]
    output_len: int
    temperature: float = 1.0
    seed: int = 0


class OfflineEngine:
    """A started engine; use it inside ``with_engine`` only."""

    def __init__(self, client: ProcessEngineClient) -> None:
        self._client = client
        self._count = 0

    async def generate(self, work: Sequence[Work]) -> list[RequestRecord]:
        """Submit all of ``work`` at once and wait. Records time each event; ``text`` stays empty."""
        return list(await asyncio.gather(*(self._one(item) for item in work)))

    async def _one(self, work: Work) -> RequestRecord:
        self._count += 1
        sampling = SamplingParams(
            max_tokens=work.output_len, temperature=work.temperature, seed=work.seed, ignore_eos=True
        )
        request = Request(
            request_id=f"bench-{self._count}",
            prompt_token_ids=work.prompt_ids,
            sampling=sampling,
            arrival_s=time.monotonic(),
        )
        record = RequestRecord(start=time.perf_counter(), prompt_tokens=len(work.prompt_ids), output_tokens=0)
        async for event in self._client.submit(request):
            record.chunk_times.append(time.perf_counter())
            record.output_tokens = (record.output_tokens or 0) + len(event.token_ids)
            if event.error is not None:
                raise EngineError(f"The engine refused a benchmark request: {event.error}")
        return record


def with_engine(config: EngineConfig, work: Callable[[OfflineEngine], Awaitable[_T]]) -> _T:
    """Start the engine of ``config`` (model already a path), run ``work`` on it, end it."""

    async def main() -> _T:
        with StartupProgress() as progress:
            client = ProcessEngineClient(config, progress)
            try:
                await client.start()
            except BaseException:
                await client.close()
                raise
        print(startup_line(client.info))
        try:
            return await work(OfflineEngine(client))
        finally:
            await client.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def located(config: EngineConfig) -> tuple[EngineConfig, Path]:
    """``config`` with its model on disk, and the path of its tokenizer."""
    config, _ = resolve_files(config, ServerConfig(), os.environ)
    return config, Path(str(config.tokenizer))


def sampled_copies(work: Sequence[Work], n: int) -> list[Work]:
    """Each item ``n`` times, with different seeds."""
    return [replace(item, seed=item.seed + copy) for item in work for copy in range(n)]
