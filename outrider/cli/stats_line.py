"""The statistics line of the log, every ten seconds while there is work.

Run by ``cli/serve.py`` beside the HTTP server; reads counters that the engine sends and asks for none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from outrider.types import EngineStats

INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


async def log_stats(read: Callable[[], EngineStats], interval_s: float = INTERVAL_S) -> None:
    """Log one line per interval in which there were steps or requests; runs until cancelled."""
    loop = asyncio.get_running_loop()
    before, since = read(), loop.time()
    while True:
        await asyncio.sleep(interval_s)
        now, at = read(), loop.time()
        if now.steps < before.steps:  # a new engine process counts from zero
            before = EngineStats()
        if now.num_running or now.num_waiting or now.steps != before.steps:
            logger.info(stats_line(before, now, at - since))
        before, since = now, at


def stats_line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """The line for two snapshots ``seconds`` apart; rates are over that time, the hit rate too."""
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generated = (now.generation_tokens - before.generation_tokens) / seconds
    queries = now.prefix_query_tokens - before.prefix_query_tokens
    hits = now.cached_prompt_tokens - before.cached_prompt_tokens
    used = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
    return (
        f"Engine 000: Avg prompt throughput: {prompt:.1f} tokens/s, "
        f"Avg generation throughput: {generated:.1f} tokens/s, "
        f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, "
        f"GPU KV cache usage: {used:.1%}, "
        f"Prefix cache hit rate: {hits / queries if queries else 0.0:.1%}"
    )
