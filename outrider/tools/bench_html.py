"""The benchmark as a page: figures beside the recipe's, distributions, timeline, and the sweep's curves.

``bench_serve`` calls ``serve_page``, ``bench_sweep`` calls ``sweep_page``; both return a self-contained HTML
text. Draws only what it is given: no measuring, no file writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.errors import ConfigError
from outrider.tools.bench_load import LoadResult
from outrider.tools.bench_metrics import Metrics, in_flight, per_second
from outrider.tools.bench_report import RunInfo, result_json
from outrider.tools.plots import Mark, Series, cdf_plot, line_plot, number, page, span_plot, table
from outrider.tools.recipe_figures import BENCH

_ROWS = {
    "output_throughput": "Output tokens a second",
    "total_token_throughput": "Total tokens a second",
    "request_throughput": "Requests a second",
    "max_concurrency": "Maximum concurrency",
    "completed": "Requests",
    "duration": "Duration, s",
    "total_input_tokens": "Input tokens",
    "total_output_tokens": "Output tokens",
    "mean_ttft_ms": "Mean TTFT, ms",
    "median_ttft_ms": "Median TTFT, ms",
    "p99_ttft_ms": "P99 TTFT, ms",
    "mean_tpot_ms": "Mean TPOT, ms",
    "median_tpot_ms": "Median TPOT, ms",
    "p99_tpot_ms": "P99 TPOT, ms",
    "median_itl_ms": "Median ITL, ms",
    "p99_itl_ms": "P99 ITL, ms",
}


_COLUMNS = {
    "input_len": "Input",
    "output_len": "Output",
    "max_concurrency": "Streams",
    "completed": "Done",
    "failed": "Failed",
    "output_throughput": "Tokens/s",
    "median_ttft_ms": "TTFT, ms",
    "p99_ttft_ms": "P99 TTFT",
    "median_tpot_ms": "TPOT, ms",
    "p99_itl_ms": "P99 ITL",
}


def serve_page(info: RunInfo, metrics: Metrics, load: LoadResult, compare: Sequence[str]) -> str:
    """One run's page; ``compare`` are result files of other runs, shown as further columns."""
    result = result_json(info, metrics, load, style="v1", detailed=False)
    columns: dict[str, Mapping[str, Any]] = {"This run": result}
    columns |= {Path(name).stem: _read_result(name) for name in compare}
    columns |= BENCH
    plots = [_throughput_over_time(load), _concurrency_over_time(load)]
    for name, title in (
        ("ttft", "Time to first token"),
        ("tpot", "Time per output token"),
        ("itl", "Inter-token latency"),
    ):
        marks = [
            Mark(f"{stat} {label}", float(figures[f"{key}_{name}_ms"]))
            for label, figures in BENCH.items()
            for stat, key in (("median", "median"), ("P99", "p99"))
        ]
        plots.append(cdf_plot(title, "ms", metrics.latencies[name].values.tolist(), marks))
    spans = [
        (record.start - load.start, record.chunk_times[0] - load.start, record.chunk_times[-1] - load.start)
        for record in load.records
        if record.success
    ]
    plots.append(span_plot("Timeline", spans))
    intro = f"{info.model_id}, {info.date}, backend {info.backend}, {info.num_prompts} prompts. "
    return page("Serving benchmark", intro + _BESIDE, [_comparison(columns)], plots)


def sweep_page(points: Sequence[Mapping[str, Any]]) -> str:
    """A sweep's page; each point is a result JSON with ``input_len``, ``output_len`` and
    ``max_concurrency``.
    """
    lengths = sorted({int(point["input_len"]) for point in points})
    by_concurrency = [
        _swept(points, "output_throughput", "Output throughput", "tokens a second", lengths),
        _swept(points, "median_ttft_ms", "Median TTFT", "ms", lengths, log_y=True),
        _swept(points, "median_tpot_ms", "Median TPOT", "ms", lengths),
        _swept(points, "p99_itl_ms", "P99 ITL", "ms", lengths, log_y=True),
    ]
    by_length = [] if len(lengths) < 2 else [
        _by_length(points, "median_ttft_ms", "Median TTFT by input length", "ms"),
        _by_length(points, "output_throughput", "Output throughput by input length", "tokens a second"),
    ]  # fmt: skip
    rows = [[number(float(point[key])) for key in _COLUMNS] for point in points]
    intro = f"{points[0]['model_id']}, {points[0]['date']}. {_BESIDE}"
    return page("Benchmark sweep", intro, [table(tuple(_COLUMNS.values()), rows)], by_concurrency + by_length)


_BESIDE = "Beside it the published figures of the vLLM recipe (one B200, 1,024 in / 1,024 out, August 2025)."


def _swept(
    points: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    unit: str,
    lengths: Sequence[int],
    *,
    log_y: bool = False,
) -> str:
    series = []
    for length in lengths:
        chosen = sorted((p["max_concurrency"], p[key]) for p in points if p["input_len"] == length)
        xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
        series.append(Series(f"input {number(length)}", xs, ys, points=True))
    marks = [Mark(label, figures["max_concurrency"], figures[key]) for label, figures in BENCH.items()]
    return line_plot(title, "concurrent requests", unit, series, marks=marks, log_x=True, log_y=log_y)


def _by_length(points: Sequence[Mapping[str, Any]], key: str, title: str, unit: str) -> str:
    series = []
    for concurrency in sorted({point["max_concurrency"] for point in points}):
        chosen = sorted((p["input_len"], p[key]) for p in points if p["max_concurrency"] == concurrency)
        xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
        series.append(Series(f"{concurrency} concurrent", xs, ys, points=True))
    return line_plot(title, "input tokens", unit, series, log_x=True, log_y=True)


def _comparison(columns: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for key, label in _ROWS.items():
        values = [column.get(key) for column in columns.values()]
        rows.append([label, *("–" if value is None else number(float(value)) for value in values)])
    return table(["", *columns], rows)


def _throughput_over_time(load: LoadResult) -> str:
    times = [np.frombuffer(record.chunk_times) for record in load.records if record.success]
    if not times:
        return ""
    chunks = np.concatenate(times)
    buckets = per_second(chunks, np.ones(len(chunks)), load.start)
    series = Series("chunks", list(range(len(buckets))), buckets.tolist())
    return line_plot("Output over time", "seconds", "chunks a second", [series])


def _concurrency_over_time(load: LoadResult) -> str:
    kept = [record for record in load.records if record.success]
    if not kept:
        return ""
    starts = np.array([record.start for record in kept])
    firsts = np.array([record.chunk_times[0] for record in kept])
    ends = np.array([record.chunk_times[-1] for record in kept])
    seconds = np.linspace(0.0, float(ends.max()) - load.start, 400)
    series = []
    for label, left, right in (("in flight", starts, ends), ("waiting for the first token", starts, firsts)):
        series.append(Series(label, seconds.tolist(), in_flight(left, right, load.start + seconds).tolist()))
    return line_plot("Requests over time", "seconds", "requests", series)


def _read_result(name: str) -> Mapping[str, Any]:
    try:
        result = json.loads(Path(name).read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"--html-compare {name} is no result of bench serve: {error}.") from error
    if not isinstance(result, dict):
        raise ConfigError(f"--html-compare {name} is no result of bench serve: it holds no JSON object.")
    return result
