"""Prometheus metrics under the names that dashboards for this API already use.

Request timings are observed by ``RequestTimer`` as events pass through the front end, HTTP figures by the middleware;
the engine's own are read at scrape time (``engine_metrics``). One registry per application, no global state.
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
    Summary,
    generate_latest,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outrider.config import EngineConfig
from outrider.engine.protocol import EngineClient
from outrider.server.engine_metrics import LABELS, EngineCollector
from outrider.types import Request

# fmt: off
_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_N = (1, 2, 5, 10, 20)
_HTTP = (0.1, 0.5, 1)
_HTTP_FINE = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)
# fmt: on
_REASONS = ("stop", "length", "abort", "error", "repetition")


def _length_buckets(max_model_len: int) -> tuple[int, ...]:
    steps = [mantissa * 10**exponent for exponent in range(9) for mantissa in (1, 2, 5)]
    return tuple(step for step in steps if step <= max_model_len) or (1,)


class Metrics:
    """All metrics of one server."""

    def __init__(self, engine: EngineClient, engine_config: EngineConfig, model_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._labels = (model_name, "0")
        self.registry.register(EngineCollector(engine, engine_config, self._labels))
        lengths = _length_buckets(engine.info.max_model_len)
        histogram = self._histogram

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.itl = _TokenGaps(self._labels)
        self.registry.register(self.itl)
        per_token = "Mean time of a request's tokens after its first."
        self.tpot = histogram("request_time_per_output_token_seconds", per_token, _PER_TOKEN)
        self.tpot_old = histogram("time_per_output_token_seconds", per_token, _PER_TOKEN)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first step.", _LATENCY)
        self.prefill = histogram("request_prefill_time_seconds", "First step to first token.", _LATENCY)
        self.decode = histogram("request_decode_time_seconds", "First to last token.", _LATENCY)
        self.inference = histogram("request_inference_time_seconds", "First step to last token.", _LATENCY)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self.output_tokens = histogram("request_generation_tokens", "Generated tokens of a request.", lengths)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", lengths)
        computed = "Prompt tokens of a request that the prefix cache did not hold."
        self.computed_tokens = histogram("request_prefill_kv_computed_tokens", computed, lengths)
        longest = "Generated tokens of the longest of a prompt's n choices."
        self.max_output_tokens = histogram("request_max_num_generation_tokens", longest, lengths)
        self.params_n = histogram("request_params_n", "n of a request.", _N)

        finished = self._counter(
            "vllm:request_success", "Finished requests by reason.", (*LABELS, "finished_reason")
        )
        self.finished = {reason: finished.labels(*self._labels, reason) for reason in _REASONS}
        parsed = "Answers that were searched for tool calls."
        self.tool_parses = self._counter("vllm:tool_call_parser_invocations", parsed, LABELS).labels(
            *self._labels
        )
        self._http_requests = self._counter(
            "http_requests", "HTTP requests.", ("method", "status", "handler")
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Time to answer.",
            ("method", "handler"),
            buckets=_HTTP,
            registry=self.registry,
        )
        self._http_seconds_fine = Histogram(
            "http_request_duration_highr_seconds",
            "Time to answer.",
            buckets=_HTTP_FINE,
            registry=self.registry,
        )
        self._request_bytes = Summary(
            "http_request_size_bytes", "Bytes of bodies received.", ("handler",), registry=self.registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes", "Bytes of bodies sent.", ("handler",), registry=self.registry
        )
        self.in_flight = 0

    def start_request(self, request: Request) -> RequestTimer:
        """Begin to time a request."""
        self.in_flight += 1
        self.prompt_tokens.observe(len(request.prompt_token_ids))
        self.max_tokens.observe(request.sampling.max_tokens)
        return RequestTimer(self, len(request.prompt_token_ids))

    def observe_choices(self, num_tokens: list[int]) -> None:
        """A prompt's ``n`` choices have ended, with so many generated tokens each."""
        self.params_n.observe(len(num_tokens))
        self.max_output_tokens.observe(max(num_tokens))

    def observe_http(
        self, method: str, handler: str, status: int, seconds: float, num_received: int, num_sent: int
    ) -> None:
        """An HTTP request was answered; sizes are those of the bodies, in bytes."""
        self._http_requests.labels(method, f"{status // 100}xx", handler).inc()
        self._http_seconds.labels(method, handler).observe(seconds)
        self._http_seconds_fine.observe(seconds)
        self._request_bytes.labels(handler).observe(num_received)
        self._response_bytes.labels(handler).observe(num_sent)

    def render(self) -> bytes:
        """The page in Prometheus text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, LABELS, buckets=tuple(buckets), registry=self.registry)
        return made.labels(*self._labels)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


class RequestTimer:
    """Clock of one request."""

    __slots__ = ("_first_s", "_last_s", "_metrics", "_prompt_len", "_queue_s", "_start_s")

    def __init__(self, metrics: Metrics, prompt_len: int) -> None:
        self._metrics = metrics
        self._prompt_len = prompt_len
        self._start_s = time.perf_counter()
        self._queue_s = 0.0
        self._first_s = 0.0
        self._last_s = 0.0

    def tokens(self, num_tokens: int, queue_s: float = 0.0) -> None:
        """``num_tokens`` tokens arrived together; ``queue_s`` counts with the first of them."""
        if num_tokens == 0:
            return
        now = time.perf_counter()
        if self._first_s == 0.0:
            self._first_s = now
            self._queue_s = min(max(queue_s, 0.0), now - self._start_s)
            self._metrics.ttft.observe(now - self._start_s)
        else:
            self._metrics.itl.observe((now - self._last_s) / num_tokens)
        self._last_s = now

    def finish(self, reason: str, num_tokens: int, num_cached: int) -> None:
        """The request ended with so many generated tokens; ``num_cached`` of its prompt's were not computed."""
        metrics = self._metrics
        metrics.in_flight -= 1
        metrics.finished[reason].inc()
        metrics.e2e.observe(time.perf_counter() - self._start_s)
        metrics.output_tokens.observe(num_tokens)
        if not self._first_s:
            return
        started_s, decode_s = self._start_s + self._queue_s, self._last_s - self._first_s
        metrics.queue.observe(self._queue_s)
        metrics.prefill.observe(self._first_s - started_s)
        metrics.decode.observe(decode_s)
        metrics.inference.observe(self._last_s - started_s)
        metrics.computed_tokens.observe(self._prompt_len - num_cached)
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
        family = HistogramMetricFamily(name, "Time between tokens of a request.", labels=LABELS)
        family.add_metric(self._labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family
