"""Prometheus metrics under the names that dashboards for this API already use.

Engine gauges and counters are read from ``EngineStats`` when ``/metrics`` is scraped; request timings are observed
by ``RequestTimer`` as events pass through the front end. One registry per application, no global state.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outrider.engine.protocol import EngineClient
from outrider.types import Request

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_N = (1, 2, 5, 10, 20)
_LABELS = ("model_name", "engine")


def _length_buckets(max_model_len: int) -> tuple[int, ...]:
    steps = [mantissa * 10**exponent for exponent in range(9) for mantissa in (1, 2, 5)]
    return tuple(step for step in steps if step <= max_model_len) or (1,)


class Metrics:
    """All metrics of one server."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        labels = (model_name, "0")
        self.registry.register(_EngineCollector(engine, labels))
        lengths = _length_buckets(engine.info.max_model_len)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, _LABELS, buckets=tuple(buckets), registry=self.registry)
            return made.labels(*labels)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.itl = _TokenGaps(labels)
        self.registry.register(self.itl)
        per_token = "Mean time of a request's tokens after its first."
        self.tpot = histogram("request_time_per_output_token_seconds", per_token, _PER_TOKEN)
        self.tpot_old = histogram("time_per_output_token_seconds", per_token, _PER_TOKEN)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.decode = histogram("request_decode_time_seconds", "First to last token.", _LATENCY)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self.output_tokens = histogram("request_generation_tokens", "Generated tokens of a request.", lengths)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", lengths)
        self.params_n = histogram("request_params_n", "n of a request.", _N)
        self._success = Counter(
            "vllm:request_success",
            "Finished requests by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self.finished = {
            reason: self._success.labels(*labels, reason) for reason in ("stop", "length", "abort", "error")
        }
        self.http_requests = Counter(
            "http_requests", "HTTP requests.", ("method", "status", "handler"), registry=self.registry
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time to answer.",
            ("method", "handler"),
            buckets=(0.1, 0.5, 1),
            registry=self.registry,
        )
        self.in_flight = 0

    def start_request(self, request: Request) -> RequestTimer:
        """Begin to time a request."""
        self.in_flight += 1
        self.prompt_tokens.observe(len(request.prompt_token_ids))
        self.max_tokens.observe(request.sampling.max_tokens)
        return RequestTimer(self)

    def render(self) -> bytes:
        """The page in Prometheus text format."""
        return generate_latest(self.registry)


class RequestTimer:
    """Clock of one request."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_start_s")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0

    def tokens(self, num_tokens: int) -> None:
        """``num_tokens`` tokens arrived together."""
        if num_tokens == 0:
            return
        now = time.perf_counter()
        if self._first_s == 0.0:
            self._first_s = now
            self._metrics.ttft.observe(now - self._start_s)
        else:
            self._metrics.itl.observe((now - self._last_s) / num_tokens)
        self._last_s = now

    def finish(self, reason: str, num_tokens: int) -> None:
        """The request ended."""
        metrics = self._metrics
        metrics.in_flight -= 1
        metrics.finished[reason].inc()
        metrics.e2e.observe(time.perf_counter() - self._start_s)
        metrics.output_tokens.observe(num_tokens)
        if self._first_s:
            decode_s = self._last_s - self._first_s
            metrics.decode.observe(decode_s)
            if num_tokens > 1:
                metrics.tpot.observe(decode_s / (num_tokens - 1))
                metrics.tpot_old.observe(decode_s / (num_tokens - 1))


class _TokenGaps(Collector):
    """The histogram of inter-token latency: one observation a streamed token, so counted without locks or labels."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._counts = [0] * (len(_PER_TOKEN) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """One gap; from the event loop's thread only."""
        self._counts[bisect_left(_PER_TOKEN, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[Metric]:
        """The family with its cumulative buckets."""
        bounds = [*(str(float(bound)) for bound in _PER_TOKEN), "+Inf"]
        name = "vllm:inter_token_latency_seconds"
        family = HistogramMetricFamily(name, "Time between tokens of a request.", labels=_LABELS)
        family.add_metric(self._labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class _EngineCollector(Collector):
    """Reads ``engine.stats`` at scrape time."""

    def __init__(self, engine: EngineClient, labels: tuple[str, ...]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        """Gauges and counters of the engine's latest snapshot."""
        stats, info = self._engine.stats, self._engine.info
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.", usage)
        yield self._gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", usage)
        counters = {
            "prompt_tokens": ("Prompt tokens processed.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generation_tokens),
            "prompt_tokens_cached": ("Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens),
            "num_preemptions": ("Requests put back to the queue.", stats.preemptions),
            "prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_query_tokens,
            ),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens),
            "gpu_prefix_cache_queries": ("Older name of prefix_cache_queries.", stats.prefix_query_tokens),
            "gpu_prefix_cache_hits": ("Older name of prefix_cache_hits.", stats.cached_prompt_tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        for name, text, value in (
            (
                "engine_stalled",
                "Times that the engine did not move while it had work.",
                self._engine.num_stalls,
            ),
            ("engine_restarts", "Times that the engine was started again.", self._engine.num_restarts),
        ):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache.",
            labels=("block_size", "num_gpu_blocks", "cache_dtype", "engine"),
        )
        config.add_metric((str(info.block_size), str(info.num_blocks), info.kv_cache_dtype, "0"), 1)
        yield config

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        gauge.add_metric(self._labels, value)
        return gauge
