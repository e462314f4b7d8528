"""The published figures that outrider's own are shown beside: Llama 4 Scout on one B200 with vLLM, August
2025.

Read by the HTML pages and ``eval gsm8k``. Source: docs.vllm.ai/projects/recipes, Llama/Llama4-Scout: random
1,024 in / 1,024 out, 512 concurrent, 2,560 prompts; GSM8K 5-shot. Keys of ``BENCH`` are those of the result
JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_BENCH_KEYS = (
    "max_concurrency", "completed", "duration", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms",
    "mean_itl_ms", "median_itl_ms", "p99_itl_ms",
)  # fmt: skip


def _bench(*values: float) -> Mapping[str, float]:
    return MappingProxyType(dict(zip(_BENCH_KEYS, values, strict=True)))


@dataclass(frozen=True)
class Score:
    """A GSM8K score as published: filter, exact match, standard error (1,319 questions)."""

    filter: str
    value: float
    stderr: float

    @property
    def pass_mark(self) -> float:
        """Two standard errors below the published value: a run under it is worse by more than chance."""
        return self.value - 2 * self.stderr


BENCH: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "FP8 on B200": _bench(
            512, 2560, 654.98, 2616855, 2621440, 3.91, 4002.32, 7997.65,
            21437.04, 13619.42, 88099.07, 102.25, 90.17, 163.85, 102.25, 66.39, 375.98,
        ),
        "FP4 on B200": _bench(
            512, 2560, 385.57, 2616855, 2621440, 6.64, 6798.82, 13585.75,
            2847.42, 1923.98, 12680.62, 70.11, 70.82, 77.64, 70.11, 62.31, 215.29,
        ),
    }
)  # fmt: skip

GSM8K: Mapping[str, tuple[Score, ...]] = MappingProxyType(
    {
        "fp8": (Score("flexible-extract", 0.9219, 0.0074), Score("strict-match", 0.9075, 0.0080)),
        "fp4": (Score("flexible-extract", 0.8969, 0.0084), Score("strict-match", 0.8779, 0.0090)),
    }
)
