"""The flags of ``bench serve`` and what they mean together: August 2025 and vLLM 0.26 spellings alike.

``add_serve_arguments`` declares them; the ``*_from`` functions turn the namespace
into the values that ``bench_serve`` works with. Raises ConfigError with a sentence; sends nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from outrider.errors import ConfigError
from outrider.tools.bench_datasets import DATASETS, DatasetOptions, parse_range_ratio
from outrider.tools.bench_load import Schedule
from outrider.tools.bench_metrics import METRICS, parse_goodput
from outrider.tools.bench_report import REPORT_STYLES
from outrider.tools.http_api import base_url, bearer
from outrider.tools.output_files import check_writable

CHAT_BACKENDS = ("openai-chat", "vllm-chat")
BACKENDS = ("vllm", "openai", "sglang", "lmdeploy", "scalellm", *CHAT_BACKENDS)
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``bench serve``."""
    _add_target(parser)
    _add_load(parser)
    _add_dataset(parser)
    _add_sampling(parser)
    _add_output(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server under test")
    group.add_argument("--backend", "--endpoint-type", default="vllm", choices=BACKENDS, help="kind of API")
    group.add_argument("--base-url", help="http(s)://HOST:PORT, instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=8000)
    group.add_argument("--endpoint", help="path of the API (default: by --backend)")
    group.add_argument("--model", help="model (default: the first of /v1/models)")
    group.add_argument("--served-model-name", help="name to send, where it differs from --model")
    group.add_argument("--tokenizer", help="folder, tokenizer.json or hub id (default: --model)")
    group.add_argument("--tokenizer-mode", default="auto", help="accepted; has no effect")
    group.add_argument("--trust-remote-code", action="store_true", help="accepted; has no effect")
    group.add_argument("--header", nargs="*", default=[], metavar="K=V", help="extra HTTP headers")
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="extra body fields"
    )
    group.add_argument("--insecure", action="store_true", help="do not verify TLS certificates")
    group.add_argument("--request-id-prefix", help="of the x-request-id header (default: bench-<8 hex>-)")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--num-prompts", type=int, default=1000)
    group.add_argument("--request-rate", type=float, default=float("inf"), help="requests a second")
    group.add_argument(
        "--burstiness", type=float, default=1.0, help="shape of the gaps' gamma law (1: Poisson)"
    )
    group.add_argument("--max-concurrency", type=int, help="most requests in flight")
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    group.add_argument("--ramp-up-start-rps", type=float)
    group.add_argument("--ramp-up-end-rps", type=float)
    group.add_argument("--num-warmups", type=int, default=0, help="requests before the measurement")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=600.0,
        help="wait for the server this long (0: no check)",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset-name", default="random", choices=DATASETS)
    group.add_argument("--dataset-path", help="file of sharegpt (JSON) or custom (JSONL)")
    group.add_argument("--input-len", type=int, help="same as --random-input-len")
    group.add_argument("--output-len", type=int, help="output length, whatever the dataset")
    group.add_argument("--random-input-len", type=int, default=1024)
    group.add_argument("--random-output-len", type=int, default=128)
    group.add_argument("--random-range-ratio", default="0.0", help='0..1 or {"input": a, "output": b}')
    group.add_argument("--random-prefix-len", type=int, default=0, help="tokens that all prompts share")
    group.add_argument("--sharegpt-output-len", type=int)
    group.add_argument("--custom-output-len", type=int, default=256, help="-1: 'output_tokens' of each line")
    group.add_argument(
        "--skip-chat-template", action="store_true", help="accepted; prompts are sent as they are"
    )
    group.add_argument("--no-oversample", action="store_true", help="send fewer where the file holds fewer")
    group.add_argument("--disable-shuffle", action="store_true", help="keep the file's order")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (not sent when absent, but temperature: 0)")
    for name in (
        "temperature",
        "top-p",
        "min-p",
        "frequency-penalty",
        "presence-penalty",
        "repetition-penalty",
    ):
        group.add_argument(f"--{name}", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--logprobs", type=int, help="top alternatives to ask for")
    group.add_argument("--ignore-eos", action="store_true", help="always generate the full length")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save-result", action="store_true", help="write the figures as JSON")
    group.add_argument("--save-detailed", action="store_true", help="with every request's times and text")
    group.add_argument("--append-result", action="store_true", help="add a line to the file")
    group.add_argument("--result-dir", help="folder of the result file")
    group.add_argument("--result-filename")
    group.add_argument("--label", help="first part of the default file name")
    group.add_argument("--metadata", nargs="*", default=[], metavar="K=V", help="kept in the JSON")
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl", help="of ttft,tpot,itl,e2el")
    group.add_argument("--metric-percentiles", default="99", help="comma-separated, e.g. 50,90,99")
    group.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="e.g. ttft:500 tpot:50")
    group.add_argument("--report-style", choices=REPORT_STYLES, default="seed", help="2025's or vLLM 0.26's")
    group.add_argument("--html", metavar="FILE", help="write a page with plots beside the recipe's figures")
    group.add_argument(
        "--html-compare", nargs="*", default=[], metavar="JSON", help="other results to draw in"
    )


def check(args: argparse.Namespace) -> None:
    """``ConfigError`` for flags that cannot be used, before a server is asked or a prompt is made."""
    url = urlsplit(base_url_from(args))
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"--base-url {args.base_url} must look like http://HOST:PORT.")
    if not 1 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} is out of range; use 1 to 65535.")
    for name, least in (("num_prompts", 1), ("num_warmups", 0), ("seed", 0), ("random_prefix_len", 0)):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {getattr(args, name)}; it must be at least {least}.")
    endpoint_from(args)
    schedule_from(args)
    dataset_from(args)
    percentiles_from(args)
    selected_from(args)
    pairs(args.header, "--header")
    pairs(args.metadata, "--metadata")
    parse_goodput(args.goodput)
    check_writable(args.html, "--html")
    if args.save_result or args.append_result:
        check_writable(
            Path(args.result_dir or "") / (args.result_filename or "result.json"), "--result-filename"
        )
    for file in args.html_compare:
        if not Path(file).is_file():
            raise ConfigError(f"--html-compare {file} does not exist.")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body {text!r} must be a JSON object.")
    return dict(value)


def without_effect(args: argparse.Namespace) -> list[str]:
    """One sentence for each flag that was given, is accepted for compatibility and changes nothing."""
    given = {
        "--trust-remote-code": (args.trust_remote_code, "no code of a checkpoint is ever run"),
        "--tokenizer-mode": (args.tokenizer_mode != "auto", "there is one tokenizer implementation"),
        "--skip-chat-template": (args.skip_chat_template, "prompts are always sent as they are"),
    }
    return [f"{flag} has no effect here: {reason}." for flag, (is_given, reason) in given.items() if is_given]


def base_url_from(args: argparse.Namespace) -> str:
    """``--base-url`` (with or without its ``/v1``), or host and port."""
    return str(args.base_url or base_url(args.host, args.port)).rstrip("/").removesuffix("/v1")


def endpoint_from(args: argparse.Namespace) -> str:
    """``--endpoint``, checked against the backend, or the backend's own."""
    wanted = "/v1/chat/completions" if args.backend in CHAT_BACKENDS else "/v1/completions"
    endpoint = args.endpoint or wanted
    is_chat = endpoint.endswith("chat/completions")
    if is_chat != (args.backend in CHAT_BACKENDS) or not endpoint.endswith("completions"):
        raise ConfigError(
            f"--endpoint {endpoint} does not fit --backend {args.backend}; it should be {wanted}."
        )
    return endpoint


def headers_from(args: argparse.Namespace) -> dict[str, str]:
    """Extra headers, and the bearer token of OPENAI_API_KEY."""
    return bearer() | pairs(args.header, "--header")


def extra_body_from(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling fields and ``--extra-body``, which wins; greedy unless told otherwise."""
    fields: dict[str, Any] = {"temperature": 0.0}
    fields |= {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    fields |= args.extra_body
    return fields


def schedule_from(args: argparse.Namespace) -> Schedule:
    """Rate, burstiness, ramp and concurrency."""
    for flag, value in (("--request-rate", args.request_rate), ("--burstiness", args.burstiness)):
        if not value > 0:
            raise ConfigError(f"{flag} is {value}; it must be greater than 0.")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency is {args.max_concurrency}; it must be at least 1.")
    ramp = None
    if args.ramp_up_strategy is not None:
        start, end = args.ramp_up_start_rps, args.ramp_up_end_rps
        if args.request_rate != float("inf"):
            raise ConfigError("--ramp-up-strategy sets the rate itself; leave out --request-rate.")
        if start is None or end is None or not 0 < start < end:
            raise ConfigError("--ramp-up-strategy needs 0 < --ramp-up-start-rps < --ramp-up-end-rps.")
        ramp = (args.ramp_up_strategy, start, end)
    return Schedule(args.request_rate, args.burstiness, ramp, args.max_concurrency, args.seed)


def dataset_from(args: argparse.Namespace) -> DatasetOptions:
    """The dataset's options; a generic length flag wins over the dataset's own."""
    own_output_len = {
        "random": args.random_output_len,
        "sharegpt": args.sharegpt_output_len,
        "custom": args.custom_output_len,
    }[args.dataset_name]
    return DatasetOptions(
        name=args.dataset_name,
        path=args.dataset_path,
        num_prompts=args.num_prompts,
        seed=args.seed,
        input_len=args.random_input_len if args.input_len is None else args.input_len,
        output_len=own_output_len if args.output_len is None else args.output_len,
        range_ratio=parse_range_ratio(args.random_range_ratio),
        prefix_len=args.random_prefix_len,
        shuffle=not args.disable_shuffle,
        oversample=not args.no_oversample,
    )


def percentiles_from(args: argparse.Namespace) -> list[float]:
    """``--metric-percentiles`` as numbers in 0..100."""
    try:
        values = [float(text) for text in args.metric_percentiles.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"--metric-percentiles {args.metric_percentiles!r} must be numbers from 0 to 100.")
    return values


def selected_from(args: argparse.Namespace) -> list[str]:
    """``--percentile-metrics`` as names."""
    names = [name.strip() for name in args.percentile_metrics.split(",") if name.strip()]
    if unknown := set(names) - set(METRICS):
        raise ConfigError(f"--percentile-metrics knows ttft, tpot, itl and e2el, not {sorted(unknown)}.")
    return names


def pairs(items: Sequence[str], flag: str) -> dict[str, str]:
    """``["a=1"]`` as ``{"a": "1"}``."""
    if bad := [item for item in items if "=" not in item]:
        raise ConfigError(f"{flag} {bad[0]!r} must look like KEY=VALUE.")
    return {key: value for key, _, value in (item.partition("=") for item in items)}
