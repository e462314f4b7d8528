"""Engine counters and gauges for ``/metrics``: read from the latest ``EngineStats`` when the page is asked for.

Registered by ``metrics``. What this server never does (speculation, an external cache) is exported as 0, because
dashboards for this API plot it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from outrider.config import EngineConfig
from outrider.engine.protocol import EngineClient
from outrider.types import STEP_TOKEN_BUCKETS, EngineStats

LABELS = ("model_name", "engine")


class EngineCollector(Collector):
    """Reads ``engine.stats`` at scrape time."""

    def __init__(self, engine: EngineClient, config: EngineConfig, labels: tuple[str, ...]) -> None:
        """``labels`` are the values of ``LABELS``."""
        self._engine = engine
        self._config = config
        self._labels = labels
        self._created_s = time.time()

    def collect(self) -> Iterator[Metric]:
        """All families, from one snapshot."""
        stats = self._engine.stats
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield self._step_tokens(stats)
        yield self._cache_config()

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        waiting = stats.num_waiting + stats.num_compiling
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", waiting)
        yield self._gauge_by(
            "num_requests_waiting_by_reason",
            "Requests in the queue: for room in the batch and the cache, or until their grammar is built.",
            "reason",
            {"capacity": stats.num_waiting, "deferred": stats.num_compiling},
        )
        yield self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage)
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", usage)
        yield self._gauge_by(
            "engine_sleep_state",
            "1 for the state the engine is in; this one never sleeps.",
            "sleep_state",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
        )

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        computed, cached, queried = stats.prompt_tokens, stats.cached_prompt_tokens, stats.prefix_query_tokens
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens taken in, computed or cached.", computed + cached),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", cached),
            ("vllm:num_preemptions", "Requests put back to the queue.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", queried),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", cached),
            ("vllm:gpu_prefix_cache_queries", "Older name of prefix_cache_queries.", queried),
            ("vllm:gpu_prefix_cache_hits", "Older name of prefix_cache_hits.", cached),
            ("vllm:external_prefix_cache_queries", "There is no external cache: always 0.", 0),
            ("vllm:external_prefix_cache_hits", "There is no external cache: always 0.", 0),
            ("vllm:mm_cache_queries", "Images are not cached: always 0.", 0),
            ("vllm:mm_cache_hits", "Images are not cached: always 0.", 0),
            ("vllm:spec_decode_num_drafts", "There is no speculation: always 0.", 0),
            ("vllm:spec_decode_num_draft_tokens", "There is no speculation: always 0.", 0),
            ("vllm:spec_decode_num_accepted_tokens", "There is no speculation: always 0.", 0),
            (
                "engine_stalled",
                "Times that the engine did not move though it had work.",
                self._engine.num_stalls,
            ),
            ("engine_restarts", "Times that the engine was started again.", self._engine.num_restarts),
        ):
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value, created=self._created_s)
            yield counter
        by_source = {"local_compute": computed, "local_cache_hit": cached, "external_kv_transfer": 0}
        yield self._counter_by(
            "prompt_tokens_by_source", "Prompt tokens by where they came from.", "source", by_source
        )
        yield self._counter_by(
            "spec_decode_num_accepted_tokens_per_pos", "There is no speculation.", "position", {"0": 0}
        )

    def _step_tokens(self, stats: EngineStats) -> Metric:
        """``iteration_tokens_total`` is a histogram, its name notwithstanding."""
        counts = stats.step_token_counts or [0] * (len(STEP_TOKEN_BUCKETS) + 1)
        bounds = [*(str(float(bound)) for bound in STEP_TOKEN_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, map(float, itertools.accumulate(counts)), strict=True))
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
        family.add_metric(self._labels, buckets=buckets, sum_value=stats.step_tokens_sum)
        return family

    def _cache_config(self) -> Metric:
        info, config = self._engine.info, self._config
        values = {
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_blocks,
            "cache_dtype": info.kv_cache_dtype,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_prefix_caching": config.enable_prefix_caching,
            "num_gpu_blocks_override": config.num_gpu_blocks_override,
            "engine": 0,
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=tuple(values))
        family.add_metric([str(value) for value in values.values()], 1)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        gauge.add_metric(self._labels, value)
        return gauge

    def _gauge_by(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=(*LABELS, label))
        for key, value in values.items():
            gauge.add_metric((*self._labels, key), value)
        return gauge

    def _counter_by(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=(*LABELS, label))
        for key, value in values.items():
            counter.add_metric((*self._labels, key), value, created=self._created_s)
        return counter
