"""What ``bench serve`` prints and saves: the text report in two styles and the result's JSON.

Called by ``bench_serve`` and ``bench_sweep``. ``seed`` is the recipe's form (August 2025), ``v1`` that of
vLLM 0.26. People and scripts compare both line by line: labels and order are fixed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from outrider.tools.bench_load import LoadResult, Schedule
from outrider.tools.bench_metrics import METRICS, Metrics

REPORT_STYLES = ("seed", "v1")
_WIDTH = 50
_TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}


@dataclass(frozen=True)
class RunInfo:
    """What was run, beside the figures: everything the JSON repeats of the command line."""

    date: str
    backend: str
    label: str | None
    model_id: str
    tokenizer_id: str | None
    num_prompts: int
    schedule: Schedule
    metadata: Mapping[str, str]
    selected: Sequence[str]
    percentiles: Sequence[float]


def percentile_name(percentile: float) -> str:
    """``99.0`` -> ``99``; ``99.9`` stays."""
    return str(int(percentile)) if float(percentile).is_integer() else str(percentile)


def text_report(info: RunInfo, metrics: Metrics, style: str = "seed") -> str:
    """The report as the recipe prints it (no trailing spaces)."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [_row(label, value) for label, value in _summary_rows(info, metrics, style)]
    for name in METRICS:
        if name not in info.selected:
            continue
        title, short = _TITLES[name]
        distribution = metrics.latencies[name]
        lines.append(f"{title:-^{_WIDTH}}")
        lines.append(_row(f"Mean {short} (ms)", distribution.mean))
        lines.append(_row(f"Median {short} (ms)", distribution.median))
        for percentile, value in distribution.percentiles.items():
            lines.append(_row(f"P{percentile_name(percentile)} {short} (ms)", value))
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _summary_rows(info: RunInfo, metrics: Metrics, style: str) -> list[tuple[str, int | float]]:
    v1 = style == "v1"
    rows: list[tuple[str, int | float] | None] = [
        ("Successful requests", metrics.completed),
        ("Failed requests", metrics.failed) if v1 else None,
        _optional("Maximum request concurrency", info.schedule.max_concurrency),
        _optional("Request rate configured (RPS)", _finite(info.schedule.request_rate)),
        ("Benchmark duration (s)", metrics.duration_s),
        ("Total input tokens", metrics.total_input_tokens),
        ("Total generated tokens", metrics.total_output_tokens),
        ("Request throughput (req/s)", metrics.request_throughput),
        _optional("Request goodput (req/s)", metrics.request_goodput),
        ("Output token throughput (tok/s)", metrics.output_throughput),
        ("Peak output token throughput (tok/s)", metrics.max_output_tokens_per_s) if v1 else None,
        ("Peak concurrent requests", float(metrics.max_concurrent_requests)) if v1 else None,
        (f"Total {'t' if v1 else 'T'}oken throughput (tok/s)", metrics.total_token_throughput),
    ]
    return [row for row in rows if row is not None]


def result_json(
    info: RunInfo, metrics: Metrics, load: LoadResult, *, style: str, detailed: bool
) -> dict[str, Any]:
    """The result file's content; ``detailed`` adds the per-request lists (seconds)."""
    schedule = info.schedule
    result: dict[str, Any] = {
        "date": info.date,
        "endpoint_type": info.backend,
        "backend": info.backend,
        "label": info.label,
        "model_id": info.model_id,
        "tokenizer_id": info.tokenizer_id,
        "num_prompts": info.num_prompts,
        **info.metadata,
        "request_rate": _finite(schedule.request_rate) or "inf",
        "burstiness": schedule.burstiness,
        "max_concurrency": schedule.max_concurrency,
    }
    if schedule.ramp is not None:
        keys = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        result |= dict(zip(keys, schedule.ramp, strict=True))
    result |= _figures(metrics)
    if schedule.ramp is not None:
        result["rps_change_events"] = _rate_changes(info, load)
    if style == "seed":
        result["request_goodput:"] = metrics.request_goodput  # the key's colon is part of the 2025 format
    for name in info.selected:
        distribution = metrics.latencies[name]
        result |= {
            f"mean_{name}_ms": distribution.mean,
            f"median_{name}_ms": distribution.median,
            f"std_{name}_ms": distribution.std,
        }
        for percentile, value in distribution.percentiles.items():
            result[f"p{percentile_name(percentile)}_{name}_ms"] = value
    return result | _details(metrics, load) if detailed else result


def save_result(result: Mapping[str, Any], path: Path, *, append: bool) -> None:
    """Write ``result`` as one line of JSON; ``append`` adds a line instead of replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result)
    if append and path.exists() and path.stat().st_size > 0:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + line)
    else:
        path.write_text(line, encoding="utf-8")


def _figures(metrics: Metrics) -> dict[str, Any]:
    return {
        "duration": metrics.duration_s,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "total_input_tokens": metrics.total_input_tokens,
        "total_output_tokens": metrics.total_output_tokens,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
        "rtfx": 0.0,  # of audio, which this client does not send
    }


def _rate_changes(info: RunInfo, load: LoadResult) -> list[dict[str, Any]]:
    """When a ramp reached each whole rate: ``{"rps": requests a second, "timestamp": local time as ISO 8601}``."""
    origin = datetime.now() - timedelta(seconds=time.perf_counter())
    changes: list[dict[str, Any]] = []
    for index, record in enumerate(load.records):
        rate = int(info.schedule.rate_at(index, len(load.records)))
        last = changes[-1]["rps"] if changes else None
        at = (origin + timedelta(seconds=record.start)).isoformat()
        changes += [
            {"rps": rps, "timestamp": at} for rps in range(rate if last is None else last + 1, rate + 1)
        ]
    return changes


def _details(metrics: Metrics, load: LoadResult) -> dict[str, Any]:
    return {
        "input_lens": metrics.input_lens,
        "output_lens": metrics.output_lens,
        "start_times": [record.start for record in load.records],
        "ttfts": [record.ttft_s for record in load.records],
        "itls": [record.itls_s for record in load.records],
        "generated_texts": [record.text for record in load.records],
        "errors": [record.error or "" for record in load.records],
    }


def _row(label: str, value: int | float) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<40} {text}"


def _optional(label: str, value: int | float | None) -> tuple[str, int | float] | None:
    return None if value is None else (label, value)


def _finite(rate: float) -> float | None:
    return rate if rate != float("inf") else None
