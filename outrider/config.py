"""Every setting, once: two frozen dataclasses whose fields are the flags, the YAML keys and the docs.

A field carries its help text, choices, bounds and group in ``metadata`` (see ``option``). The command line,
``--config`` files, ``docs/flags.md`` and the JSON schema are all generated from here; constructing a config
checks every value against the same metadata. Never reads files, flags or the environment. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from outrider.errors import ConfigError


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with what its flag needs: ``help``, and optionally

    ``group`` (heading in the help), ``short`` (``-tp``), ``choices``, ``min``/``max`` (inclusive bounds),
    ``above`` (exclusive lower bound), ``auto`` (``auto`` and -1 mean None), ``secret`` (never logged),
    ``json`` (a list given as one JSON text) and ``no_effect`` (why the flag changes nothing here).
    """
    meta = {"help": help, **metadata}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def flag_name(name: str) -> str:
    """The flag of a field: ``max_model_len`` -> ``--max-model-len``."""
    return "--" + name.replace("_", "-")


def field_fault(name: str, value: Any, meta: Any) -> str | None:
    """One sentence about what is wrong with a field's value, or None."""
    if value is None:
        return None
    choices, low, high, above = (meta.get(key) for key in ("choices", "min", "max", "above"))
    if choices and value not in choices:
        return f"{flag_name(name)} {value!r} is not known; use one of {', '.join(map(str, choices))}."
    if isinstance(value, (int, float)):
        if above is not None and not value > above:
            return f"{flag_name(name)} {value} must be above {above}{f' and at most {high}' if high else ''}."
        if (low is not None and value < low) or (high is not None and not value <= high):
            bounds = (
                f"at least {low}"
                if high is None
                else f"at most {high}"
                if low is None
                else f"{low} to {high}"
            )
            return f"{flag_name(name)} {value} is out of range; use {bounds}."
    return None


class _Checked:
    """Base of the configs: construction refuses values outside their metadata."""

    def __post_init__(self) -> None:
        faults = list(self.faults())
        if faults:
            raise ConfigError(" ".join(faults))

    def faults(self) -> Iterator[str]:
        """Every fault of this config, one sentence each."""
        for item in fields(self):  # type: ignore[arg-type]
            fault = field_fault(item.name, getattr(self, item.name), item.metadata)
            if fault:
                yield fault


@dataclass(frozen=True, kw_only=True)
class EngineConfig(_Checked):
    """What the engine process needs to know; crosses to it as msgpack."""

    model: str = option(
        "",
        "Local folder, .gguf file or hub id; empty means the embedded SmolLM2-135M-Instruct",
        group="Model",
    )
    tokenizer: str | None = option(
        None, "Folder or hub id of the tokenizer (default: the model's)", group="Model"
    )
    dtype: str = option(
        "auto",
        "Arithmetic type of weights and activations",
        group="Model",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    quantization: str | None = option(
        None,
        "Quantization the checkpoint must have (read from it when absent)",
        group="Model",
        short="-q",
        choices=("modelopt", "modelopt_fp4"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of the KV cache",
        group="Cache",
        choices=("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3"),
    )
    load_format: str = option(
        "auto",
        "'dummy' makes random weights from config.json alone",
        group="Load",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    device: str = option("auto", "Where to run", group="Model", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "Seed of sampling for requests without their own", group="Model")
    max_model_len: int | None = option(
        None, "Longest prompt plus output in tokens; default: the model's", group="Model", min=1, auto=True
    )
    max_num_seqs: int | None = option(
        None,
        "Most sequences running at once (default 512 on a GPU, 256 on a CPU)",
        group="Scheduler",
        min=1,
        max=65_536,
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens computed in a step (default 8192 on a GPU, 512 on a CPU)",
        group="Scheduler",
        min=1,
    )
    block_size: int | None = option(
        None,
        "Tokens in a KV cache block (default 64 on a GPU, 16 on a CPU)",
        group="Cache",
        min=1,
        max=1024,
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of the GPU's memory for weights, activations and KV cache", group="Cache", above=0, max=1
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Size of the KV cache, instead of what utilization leaves", group="Cache", min=1
    )
    num_gpu_blocks_override: int | None = option(
        None, "Number of KV cache blocks, instead of what memory allows", group="Cache", min=2
    )
    enable_prefix_caching: bool = option(True, "Share the KV cache of equal prompt beginnings", group="Cache")
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps", group="Scheduler")
    async_scheduling: bool = option(
        True, "Launch the next step before reading the last one's tokens", group="Scheduler"
    )
    enforce_eager: bool = option(False, "Never use CUDA graphs", group="Model")
    deterministic: bool = option(
        False,
        "The same bits for a request whatever runs beside it, at a cost (see docs/operations.md)",
        group="Model",
    )
    tensor_parallel_size: int = option(
        1, "GPUs that share each layer", group="Parallel", short="-tp", min=1, max=1024
    )
    pipeline_parallel_size: int = option(
        1, "GPUs that share the stack of layers", group="Parallel", short="-pp", min=1, max=1024
    )
    enable_expert_parallel: bool = option(
        False, "Split MoE layers by expert instead of by column", group="Parallel", short="-ep"
    )
    max_logprobs: int = option(
        20, "Most alternatives a request may ask for (-1: no limit)", group="Model", min=-1
    )
    prefill_share_tokens: int | None = option(
        None,
        "Prompt tokens in a step that also decodes, up to four times as many while a queue's last requests start; "
        "bounds how long a step can delay a stream (default 512 on a GPU, 128 on a CPU)",
        group="Scheduler",
        min=1,
    )
    scheduling_policy: str = option(
        "fcfs", "Order of the waiting queue", group="Scheduler", choices=("fcfs", "priority")
    )
    revision: str | None = option(None, "Revision of the model on the hub", group="Load")
    download_dir: str | None = option(None, "Where hub downloads go (default: the hub cache)", group="Load")
    language_model_only: bool = option(
        False, "Do not load the vision tower; images are refused", group="Multimodal"
    )

    def faults(self) -> Iterator[str]:
        """Faults of single fields, then of fields that contradict each other."""
        yield from super().faults()
        budget, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if budget is not None and seqs is not None and budget < seqs:
            yield (
                f"--max-num-batched-tokens {budget} is below --max-num-seqs {seqs}; "
                "raise the first or lower the second."
            )
        length = self.max_model_len
        if budget is not None and length is not None and budget < length and not self.enable_chunked_prefill:
            yield (
                f"--max-num-batched-tokens {budget} is below --max-model-len {length}; "
                "raise it or drop --no-enable-chunked-prefill."
            )


@dataclass(frozen=True, kw_only=True)
class ServerConfig(_Checked):
    """What the HTTP front end needs to know."""

    host: str | None = option(None, "Address to bind (default: all interfaces)", group="HTTP")
    port: int = option(8000, "TCP port (0: any free one)", group="HTTP", min=0, max=65_535)
    uds: str | None = option(None, "Unix socket to listen on instead of host and port", group="HTTP")
    served_model_name: list[str] = option(
        [], "Names the model answers to; the first is reported", group="HTTP"
    )
    api_key: list[str] = option(
        [],
        "Keys that clients must send as 'Authorization: Bearer KEY' (default: $OUTRIDER_API_KEY)",
        group="HTTP",
        secret=True,
    )
    api_key_file: str | None = option(
        None, "File with one key a line, beside those of --api-key", group="HTTP"
    )
    root_path: str = option("", "Path prefix under which a proxy serves this server", group="HTTP")
    ssl_keyfile: str | None = option(None, "File of the TLS private key", group="HTTP")
    ssl_certfile: str | None = option(None, "File of the TLS certificate", group="HTTP")
    ssl_ca_certs: str | None = option(None, "File of CA certificates for client certificates", group="HTTP")
    ssl_cert_reqs: int = option(
        0, "Client certificates: 0 none, 1 optional, 2 required", group="HTTP", min=0, max=2
    )
    allow_credentials: bool = option(False, "CORS: allow credentials", group="HTTP")
    allowed_origins: list[str] = option(["*"], "CORS: allowed origins, a JSON list", group="HTTP", json=True)
    allowed_methods: list[str] = option(["*"], "CORS: allowed methods, a JSON list", group="HTTP", json=True)
    allowed_headers: list[str] = option(["*"], "CORS: allowed headers, a JSON list", group="HTTP", json=True)
    enable_request_id_headers: bool = option(False, "Send X-Request-Id with every answer", group="HTTP")
    disable_fastapi_docs: bool = option(False, "No /docs, /redoc and /openapi.json", group="HTTP")
    enable_server_load_tracking: bool = option(False, "Count running requests at /load", group="HTTP")
    enable_force_include_usage: bool = option(False, "Send the usage chunk on every stream", group="HTTP")
    enable_prompt_tokens_details: bool = option(False, "Report cached prompt tokens in usage", group="HTTP")
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get to finish after SIGTERM", group="HTTP", min=0, max=86_400
    )
    request_timeout: float = option(
        3600.0, "Seconds that a request may take from arrival to its last token", group="HTTP", above=0
    )
    max_num_queued_tokens: int | None = option(
        None,
        "Prompt tokens that may wait when --max-num-seqs requests are there already; more are answered 503 "
        "(default: what is prefilled in 10 seconds, as measured)",
        group="HTTP",
        min=0,
        auto=True,
    )

    chat_template: str | None = option(
        None, "File or one-line Jinja template for chat (default: the checkpoint's)", group="Chat"
    )
    default_chat_template_kwargs: dict[str, Any] = option(
        {}, "Arguments for the chat template unless the request gives them, JSON", group="Chat"
    )
    response_role: str = option("assistant", "Role of the answers", group="Chat")
    exclude_tools_when_tool_choice_none: bool = option(
        False, "Do not show the tools to the model when tool_choice is 'none'", group="Chat"
    )
    return_tokens_as_token_ids: bool = option(
        False, "Report tokens of logprobs as 'token_id:N'", group="Chat"
    )
    generation_config: str = option(
        "auto",
        "Sampling defaults: 'auto' (the model's generation_config.json), 'vllm' (neutral) or a folder",
        group="Chat",
    )
    override_generation_config: dict[str, Any] = option(
        {}, "Sampling defaults over those of --generation-config, JSON", group="Chat"
    )

    limit_mm_per_prompt: dict[str, Any] = option(
        {}, 'Most media in a request, JSON such as {"image": 4}', group="Multimodal"
    )
    allowed_local_media_path: str = option(
        "", "Folder below which file: URLs of images may be read (default: none)", group="Multimodal"
    )
    allowed_media_domains: list[str] = option(
        [], "Hosts from which images may be fetched (default: none, data: URLs only)", group="Multimodal"
    )

    uvicorn_log_level: str = option(
        "info",
        "Log level of the HTTP server",
        group="Logging",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )
    disable_uvicorn_access_log: bool = option(False, "No log line per HTTP request", group="Logging")
    disable_access_log_for_endpoints: str = option(
        "", "Paths without access log lines, separated by commas", group="Logging"
    )
    enable_log_requests: bool = option(False, "Log id and parameters of every request", group="Logging")
    disable_log_stats: bool = option(False, "No statistics line every 10 seconds", group="Logging")
    hf_token: str | None = option(
        None, "Token for gated models on the hub (default: $HF_TOKEN)", group="Load", secret=True
    )

    def faults(self) -> Iterator[str]:
        """Faults of single fields, then of fields that need each other."""
        yield from super().faults()
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            yield "--ssl-keyfile and --ssl-certfile belong together; give both or neither."
