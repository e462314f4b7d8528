"""``outrider bench serve``: measure a running OpenAI server, print the recipe's report, save JSON and HTML.

Called by the command line (``add_arguments``, ``run``) and, point by point, by ``bench_sweep``. It works
against any OpenAI-compatible server and never imports the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from outrider.errors import ConfigError
from outrider.tools import bench_flags as flags
from outrider.tools.bench_datasets import Prompt, TextCodec, load_dataset
from outrider.tools.bench_html import serve_page
from outrider.tools.bench_load import LoadResult, Progress, Schedule, Target, run_load, send_one
from outrider.tools.bench_metrics import Metrics, compute_metrics, parse_goodput
from outrider.tools.bench_report import RunInfo, result_json, save_result, text_report
from outrider.tools.bench_tokenizer import ServerCodec, open_codec
from outrider.tools.http_api import first_model, model_root

add_arguments = flags.add_serve_arguments
_T = TypeVar("_T")


@dataclass(frozen=True)
class Run:
    """One finished measurement."""

    info: RunInfo
    load: LoadResult
    metrics: Metrics


def run(args: argparse.Namespace) -> int:
    """Measure, report, save. Returns 0, or 1 when no request succeeded."""
    flags.check(args)
    print(args)
    for note in flags.without_effect(args):
        print(note, file=sys.stderr)
    target, codec = prepare(args)
    finished = measure(args, target, codec)
    write_outputs(args, finished)
    return 0 if finished.metrics.completed else 1


def prepare(args: argparse.Namespace) -> tuple[Target, TextCodec | None]:
    """Find server, model and tokenizer. Raises ConfigError when one of them cannot be reached."""
    base_url, headers = flags.base_url_from(args), flags.headers_from(args)
    if args.ready_check_timeout_sec > 0:
        _wait_until_up(base_url, headers, args)
    args.model = args.model or first_model(base_url, headers, verify=not args.insecure)
    model = args.served_model_name or args.model
    codec: TextCodec | None = None
    if args.dataset_name != "custom" or args.tokenizer:
        codec = _find_codec(args, base_url, headers, model)
        print(f"Tokenizer: {codec.source}")
    target = Target(
        base_url=base_url,
        path=flags.endpoint_from(args),
        model=model,
        chat=args.backend in flags.CHAT_BACKENDS,
        headers=headers,
        insecure=args.insecure,
        request_id_prefix=f"bench-{uuid.uuid4().hex[:8]}-"
        if args.request_id_prefix is None
        else args.request_id_prefix,
        extra=flags.extra_body_from(args),
    )
    return target, codec


def _find_codec(args: argparse.Namespace, base_url: str, headers: dict[str, str], model: str) -> TextCodec:
    """``--tokenizer`` and nothing else if given; else the model's, found by name, by path or at the server."""
    if args.tokenizer:
        return open_codec([args.tokenizer])
    root = model_root(base_url, headers, model, verify=not args.insecure)
    return open_codec(
        [args.model, root] if root else [args.model],
        ServerCodec(base_url, headers, model, insecure=args.insecure),
    )


def measure(args: argparse.Namespace, target: Target, codec: TextCodec | None) -> Run:
    """Build the prompts, send them, compute the figures."""
    schedule, goodput = flags.schedule_from(args), parse_goodput(args.goodput)
    info = RunInfo(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend=args.backend,
        label=args.label,
        model_id=args.model,
        tokenizer_id=args.tokenizer or args.model,
        num_prompts=args.num_prompts,
        schedule=schedule,
        metadata=flags.pairs(args.metadata, "--metadata"),
        selected=flags.selected_from(args),
        percentiles=flags.percentiles_from(args),
    )
    prompts = load_dataset(flags.dataset_from(args), codec)
    load = _run_event_loop(_warm_and_run(args, target, prompts, schedule))
    metrics = compute_metrics(
        load.records,
        [
            record.prompt_tokens or prompt.num_tokens
            for record, prompt in zip(load.records, prompts, strict=True)
        ],
        [
            _output_len(record.output_tokens, record.text, record.chunk_times, codec)
            for record in load.records
        ],
        load.duration_s,
        percentiles=info.percentiles,
        goodput=goodput,
    )
    return Run(replace(info, num_prompts=len(prompts)), load, metrics)


def write_outputs(args: argparse.Namespace, finished: Run) -> None:
    """Print the report; write JSON and HTML where asked."""
    print(text_report(finished.info, finished.metrics, args.report_style))
    if finished.metrics.failed:
        first = next(record.error for record in finished.load.records if not record.success)
        print(f"{finished.metrics.failed} requests failed; the first one: {first}", file=sys.stderr)
    if args.save_result or args.append_result:
        path = result_path(args, finished.info)
        result = result_json(
            finished.info,
            finished.metrics,
            finished.load,
            style=args.report_style,
            detailed=args.save_detailed,
        )
        save_result(result, path, append=args.append_result)
        print(f"Result written to {path}")
    if args.html:
        page = serve_page(finished.info, finished.metrics, finished.load, args.html_compare)
        Path(args.html).write_text(page, encoding="utf-8")
        print(f"Page written to {args.html}")


def result_path(args: argparse.Namespace, info: RunInfo) -> Path:
    """``--result-filename``, or a name made of label, rate, concurrency, model and date, in ``--result-
    dir``.
    """
    concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    model = info.model_id.rstrip("/").split("/")[-1]
    name = f"{args.label or args.backend}-{args.request_rate}qps{concurrency}-{model}-{info.date}.json"
    return Path(args.result_dir or "") / (args.result_filename or name)


def _output_len(reported: int | None, text: str, chunks: Sequence[float], codec: TextCodec | None) -> int:
    """The server's count; else the text's tokens; without a tokenizer the number of chunks."""
    if reported:
        return reported
    return len(codec.encode(text)) if codec is not None else len(chunks)


async def _warm_and_run(
    args: argparse.Namespace, target: Target, prompts: list[Prompt], schedule: Schedule
) -> LoadResult:
    if args.ready_check_timeout_sec > 0:
        print("Starting initial single prompt test run...")
        record = await send_one(target, replace(prompts[0], text="Hello", output_len=1))
        if not record.success:
            raise ConfigError(f"The test request to {target.base_url}{target.path} failed: {record.error}")
        print("Initial test run completed.")
    if args.num_warmups > 0:
        warmups = [prompts[index % len(prompts)] for index in range(args.num_warmups)]
        await run_load(target, warmups, replace(schedule, request_rate=float("inf"), ramp=None))
    print("Starting main benchmark run...")
    _print_traffic(schedule)
    bar = _ProgressBar(enabled=not args.disable_tqdm)
    try:
        return await run_load(target, prompts, schedule, bar.start)
    finally:
        await bar.stop()


def _print_traffic(schedule: Schedule) -> None:
    if schedule.ramp is not None:
        print("Traffic ramp-up: {} from {} to {} RPS".format(*schedule.ramp))
    else:
        print(f"Traffic request rate: {schedule.request_rate}")
    kind = "Poisson process" if schedule.burstiness == 1.0 else "Gamma distribution"
    print(f"Burstiness factor: {schedule.burstiness} ({kind})")
    print(f"Maximum request concurrency: {schedule.max_concurrency}")


class _ProgressBar:
    """A bar on stderr redrawn four times a second by its own task, never from a request's path."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and sys.stderr.isatty()
        self._task: asyncio.Task[None] | None = None

    def start(self, progress: Progress) -> None:
        if self._enabled:
            self._task = asyncio.create_task(self._draw(progress))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _draw(self, progress: Progress) -> None:
        from rich import progress as rich_progress
        from rich.console import Console

        columns = (
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
        )
        start = time.perf_counter()
        with rich_progress.Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
            task = bar.add_task("requests", total=progress.total, note="")
            while True:
                rate = progress.output_tokens / (time.perf_counter() - start + 1e-9)
                running = progress.started - progress.finished
                note = f"{running} running, {progress.failed} failed, {rate:.0f} tok/s finished"
                bar.update(task, completed=progress.finished, note=note)
                bar.refresh()
                await asyncio.sleep(0.25)


def _run_event_loop(main: Coroutine[Any, Any, _T]) -> _T:
    """Run ``main`` on uvloop where it exists (not on Windows): a third less time per chunk."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if sys.platform != "win32":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def _wait_until_up(base_url: str, headers: dict[str, str], args: argparse.Namespace) -> None:
    """Ask ``/v1/models`` each second until anything answers, for ``--ready-check-timeout-sec`` at most."""
    deadline = time.monotonic() + args.ready_check_timeout_sec
    is_first = True
    while True:
        try:
            httpx.get(f"{base_url}/v1/models", headers=headers, verify=not args.insecure, timeout=10.0)
            return
        except httpx.InvalidURL as error:
            raise ConfigError(f"{base_url} is no URL: {error}.") from error
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"No server answers at {base_url} ({error}); start one or fix --port."
                ) from error
            if is_first:
                print(
                    f"Nothing answers at {base_url} yet; waiting up to {args.ready_check_timeout_sec:.0f} s.",
                    file=sys.stderr,
                )
            is_first = False
        time.sleep(1.0)
