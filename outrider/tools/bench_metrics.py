"""From records to figures: the statistics of ``bench serve``, by the definitions the recipe's client uses.

TTFT: first chunk less send. TPOT: (last chunk - first chunk) / (output tokens - 1), for two tokens or more.
ITL: gaps between consecutive chunks, pooled over all requests. E2EL: last chunk less send.
Percentiles interpolate linearly. Only successful requests count. Pure arithmetic: no clock, no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outrider.errors import ConfigError
from outrider.tools.bench_client import RequestRecord

METRICS = ("ttft", "tpot", "itl", "e2el")
SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Distribution:
    """Milliseconds: mean, median, standard deviation, the asked percentiles, and all ``values``."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]
    values: np.ndarray


@dataclass(frozen=True)
class Metrics:
    """All figures of one run; throughputs per second, ``latencies`` keyed by METRICS.

    ``input_lens`` and ``output_lens`` have one entry per record, 0 where it failed.
    """

    completed: int
    failed: int
    duration_s: float
    input_lens: list[int]
    output_lens: list[int]
    request_goodput: float | None
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    latencies: dict[str, Distribution]

    @property
    def total_input_tokens(self) -> int:
        """Prompt tokens of successful requests, as the server counted them where it says."""
        return sum(self.input_lens)

    @property
    def total_output_tokens(self) -> int:
        """Generated tokens of successful requests."""
        return sum(self.output_lens)

    @property
    def request_throughput(self) -> float:
        """Completed requests a second."""
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Generated tokens a second."""
        return self.total_output_tokens / self.duration_s

    @property
    def total_token_throughput(self) -> float:
        """Prompt and generated tokens a second."""
        return (self.total_input_tokens + self.total_output_tokens) / self.duration_s


def compute_metrics(
    records: Sequence[RequestRecord],
    input_lens: Sequence[int],
    output_lens: Sequence[int],
    duration_s: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> Metrics:
    """Statistics of one run. Lengths are per record (ignored where it failed); ``goodput`` maps SLO to ms."""
    kept = [index for index, record in enumerate(records) if record.success]
    times = [np.frombuffer(records[index].chunk_times, dtype=np.float64) for index in kept]
    starts = np.array([records[index].start for index in kept])
    outputs = np.array([output_lens[index] for index in kept], dtype=np.int64)
    ttft = np.array([chunk[0] for chunk in times]) - starts
    e2el = np.array([chunk[-1] for chunk in times]) - starts
    tpot = (e2el - ttft) / np.maximum(outputs - 1, 1)
    tpot[outputs <= 1] = 0.0
    itl = np.concatenate([np.diff(chunk) for chunk in times]) if times else np.empty(0)
    values = {"ttft": ttft, "tpot": tpot[outputs > 1], "itl": itl, "e2el": e2el}
    peak_tokens, peak_requests = _peaks(times, starts, e2el)
    return Metrics(
        completed=len(kept),
        failed=len(records) - len(kept),
        duration_s=duration_s,
        input_lens=_where_successful(records, input_lens),
        output_lens=_where_successful(records, output_lens),
        request_goodput=_goodput({"ttft": ttft, "tpot": tpot, "e2el": e2el}, goodput, duration_s),
        max_output_tokens_per_s=peak_tokens,
        max_concurrent_requests=peak_requests,
        latencies={name: _distribution(array * 1000.0, percentiles) for name, array in values.items()},
    )


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` as {metric: ms}."""
    goals = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if name not in SLO_METRICS or limit < 0:
            raise ConfigError(f"--goodput {pair!r} must be one of {', '.join(SLO_METRICS)}, a colon and ms.")
        goals[name] = limit
    return goals


def per_second(times: np.ndarray, weights: np.ndarray, origin: float) -> np.ndarray:
    """Sum of ``weights`` in each one-second bucket from ``origin``; the last bucket may be partial."""
    return np.bincount(np.maximum(times - origin, 0.0).astype(np.int64), weights=weights)


def concurrency_per_second(starts: np.ndarray, ends: np.ndarray, origin: float) -> np.ndarray:
    """How many requests overlap each one-second bucket from ``origin``, [seconds] int64."""
    first = np.floor(starts - origin).astype(np.int64)
    last = np.floor(ends - origin).astype(np.int64)
    steps = np.zeros(int(last.max(initial=0)) + 2, dtype=np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last + 1, -1)
    return np.cumsum(steps)[:-1]


def in_flight(starts: np.ndarray, ends: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How many of the spans [start, end) hold each of ``times`` (all in the same seconds), int64."""
    begun = np.searchsorted(np.sort(starts), times, side="right")
    return begun - np.searchsorted(np.sort(ends), times, side="right")


def _where_successful(records: Sequence[RequestRecord], lengths: Sequence[int]) -> list[int]:
    return [length if record.success else 0 for record, length in zip(records, lengths, strict=True)]


def _peaks(times: list[np.ndarray], starts: np.ndarray, e2el: np.ndarray) -> tuple[float, int]:
    if not times:
        return 0.0, 0
    origin = float(starts.min())
    chunks = np.concatenate(times)
    tokens = per_second(chunks, np.ones(len(chunks)), origin)
    return float(tokens.max()), int(concurrency_per_second(starts, starts + e2el, origin).max())


def _goodput(
    values: Mapping[str, np.ndarray], goals: Mapping[str, float] | None, duration_s: float
) -> float | None:
    if not goals:
        return None
    good = np.ones(len(values["ttft"]), dtype=bool)
    for name, limit_ms in goals.items():
        good &= values[name] * 1000.0 <= limit_ms
    return float(good.sum()) / duration_s


def _distribution(values: np.ndarray, percentiles: Sequence[float]) -> Distribution:
    if len(values) == 0:
        return Distribution(0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0), values)
    return Distribution(
        mean=float(values.mean()),
        median=float(np.median(values)),
        std=float(values.std()),
        percentiles={p: float(np.percentile(values, p)) for p in percentiles},
        values=values,
    )
