"""Flags that scripts written for vLLM pass and that change nothing here, each with the reason.

Read by ``cli/options.py`` beside the two configs; nothing else may read a value from it. A flag given on the
command line or in a YAML file is accepted and logged in one line with its ``no_effect`` text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from outrider.config import option

_NO_COMPILE = "nothing is compiled (--enforce-eager turns CUDA graphs off)"
_FIXED = "the choice is made from the checkpoint and the device"
_UNSUPPORTED = "this server has no such feature"
_OWN_RANKS = "ranks of one server run on one host"


def _ignored(default: Any, why: str, group: str, **metadata: Any) -> Any:
    """An option without effect; its help is the reason."""
    return option(default, f"No effect: {why}", group=group, no_effect=why, **metadata)


@dataclass(frozen=True, kw_only=True)
class IgnoredConfig:
    """Accepted for compatibility. Field types only serve to parse the value that follows the flag."""

    trust_remote_code: bool = _ignored(False, "code from checkpoints is never run", "Model")
    code_revision: str | None = _ignored(None, "code from checkpoints is never run", "Model")
    tokenizer_mode: str = _ignored("auto", "the fast tokenizer is always used", "Model")
    tokenizer_revision: str | None = _ignored(None, "--revision names the revision of both", "Model")
    skip_tokenizer_init: bool = _ignored(False, "the tokenizer is always loaded", "Model")
    model_impl: str = _ignored("auto", "there is one implementation of each model", "Model")
    task: str = _ignored("auto", "only text generation is served", "Model")
    config_format: str = _ignored("auto", _FIXED, "Model")
    hf_config_path: str | None = _ignored(None, "config.json is read from the model", "Model")
    runner: str = _ignored("auto", "only text generation is served", "Model")
    convert: str = _ignored("auto", "only text generation is served", "Model")
    logprobs_mode: str = _ignored("raw_logprobs", "logprobs are always raw", "Model")
    disable_sliding_window: bool = _ignored(False, "no served model has a sliding window", "Model")
    disable_cascade_attn: bool = _ignored(False, _FIXED, "Model")
    hf_overrides: dict[str, Any] = _ignored({}, "config.json is taken as it is", "Model")
    enable_sleep_mode: bool = _ignored(False, _UNSUPPORTED, "Model")
    enable_prompt_embeds: bool = _ignored(False, _UNSUPPORTED, "Model")
    logits_processors: list[str] = _ignored([], "no code is loaded by name", "Model")

    model_loader_extra_config: dict[str, Any] = _ignored({}, "the loader needs no settings", "Load")
    ignore_patterns: list[str] = _ignored([], "only the files that are needed are fetched", "Load")
    safetensors_load_strategy: str | None = _ignored(None, "weights are always streamed", "Load")
    use_tqdm_on_load: bool = _ignored(True, "the bar follows the terminal", "Load")

    prefix_caching_hash_algo: str = _ignored("sha256", "the hash is always a keyed one", "Cache")
    calculate_kv_scales: bool = _ignored(False, "scales come from the checkpoint, else 1", "Cache")
    kv_offloading_size: float | None = _ignored(None, _UNSUPPORTED, "Cache")
    cpu_offload_gb: float = _ignored(0.0, _UNSUPPORTED, "Cache")
    swap_space: float = _ignored(0.0, "preempted requests are recomputed", "Cache")

    use_v2_block_manager: bool = _ignored(False, "there is one block manager", "Scheduler")
    preemption_mode: str | None = _ignored(None, "preempted requests are recomputed", "Scheduler")
    scheduler_delay_factor: float = _ignored(0.0, "requests start as soon as they fit", "Scheduler")
    num_lookahead_slots: int = _ignored(0, _UNSUPPORTED, "Scheduler")
    num_scheduler_steps: int = _ignored(1, "every step is scheduled", "Scheduler")
    max_num_scheduled_tokens: int | None = _ignored(
        None, "--max-num-batched-tokens bounds the step", "Scheduler"
    )
    max_num_partial_prefills: int = _ignored(1, "prefills share the token budget in order", "Scheduler")
    max_long_partial_prefills: int = _ignored(1, "prefills share the token budget in order", "Scheduler")
    long_prefill_token_threshold: int = _ignored(0, "prefills share the token budget", "Scheduler")
    disable_hybrid_kv_cache_manager: bool = _ignored(False, _FIXED, "Scheduler")
    disable_chunked_mm_input: bool = _ignored(False, "images are chunked like text", "Scheduler")
    watermark: float = _ignored(0.0, "admission looks ahead instead", "Scheduler")
    scheduler_reserve_full_isl: bool = _ignored(True, "admission looks ahead instead", "Scheduler")
    stream_interval: int = _ignored(1, "every step's tokens are sent at once", "Scheduler")

    data_parallel_size: int = _ignored(1, "start one server per replica", "Parallel", short="-dp")
    data_parallel_size_local: int = _ignored(1, "start one server per replica", "Parallel", short="-dpl")
    data_parallel_rank: int | None = _ignored(None, "start one server per replica", "Parallel", short="-dpn")
    data_parallel_start_rank: int | None = _ignored(None, "start one server per replica", "Parallel")
    data_parallel_address: str | None = _ignored(None, "start one server each", "Parallel", short="-dpa")
    data_parallel_rpc_port: int | None = _ignored(None, "start one server each", "Parallel", short="-dpp")
    data_parallel_backend: str = _ignored("mp", "start one server per replica", "Parallel", short="-dpb")
    data_parallel_hybrid_lb: bool = _ignored(False, "start one server each", "Parallel", short="-dph")
    data_parallel_external_lb: bool = _ignored(False, "start one server each", "Parallel", short="-dpe")
    data_parallel_multi_port_external_lb: bool = _ignored(
        False, "start one server each", "Parallel", short="-dpm"
    )
    decode_context_parallel_size: int = _ignored(1, _UNSUPPORTED, "Parallel", short="-dcp")
    prefill_context_parallel_size: int = _ignored(1, _UNSUPPORTED, "Parallel", short="-pcp")
    all2all_backend: str | None = _ignored(None, _FIXED, "Parallel")
    enable_eplb: bool = _ignored(False, _UNSUPPORTED, "Parallel")
    distributed_executor_backend: str | None = _ignored(None, _OWN_RANKS, "Parallel")
    nnodes: int = _ignored(1, _OWN_RANKS, "Parallel", short="-n")
    node_rank: int = _ignored(0, _OWN_RANKS, "Parallel", short="-r")
    master_addr: str = _ignored("127.0.0.1", _OWN_RANKS, "Parallel")
    master_port: int = _ignored(29_501, _OWN_RANKS, "Parallel")
    headless: bool = _ignored(False, _OWN_RANKS, "Parallel")
    api_server_count: int = _ignored(1, "one front end serves", "Parallel", short="-asc")
    worker_use_ray: bool = _ignored(False, _OWN_RANKS, "Parallel")
    max_parallel_loading_workers: int | None = _ignored(None, "every rank loads its own part", "Parallel")
    disable_frontend_multiprocessing: bool = _ignored(False, "the engine has its own process", "Parallel")
    disable_custom_all_reduce: bool = _ignored(False, "the collectives are NCCL's", "Parallel")
    device_ids: list[str] = _ignored([], "set CUDA_VISIBLE_DEVICES", "Parallel")

    compilation_config: dict[str, Any] = _ignored({}, _NO_COMPILE, "Compilation", short="-cc")
    optimization_level: int = _ignored(2, _NO_COMPILE, "Compilation")
    performance_mode: str = _ignored("balanced", _FIXED, "Compilation")
    cudagraph_capture_sizes: list[str] = _ignored([], "graph sizes follow --max-num-seqs", "Compilation")
    cuda_graph_sizes: list[str] = _ignored([], "graph sizes follow --max-num-seqs", "Compilation")
    max_seq_len_to_capture: int | None = _ignored(None, "graphs hold for any length", "Compilation")
    max_cudagraph_capture_size: int | None = _ignored(
        None, "graph sizes follow --max-num-seqs", "Compilation"
    )
    attention_backend: str = _ignored("auto", _FIXED, "Compilation")
    attention_config: dict[str, Any] = _ignored({}, _FIXED, "Compilation", short="-ac")
    kernel_config: dict[str, Any] = _ignored({}, _FIXED, "Compilation")
    moe_backend: str = _ignored("auto", _FIXED, "Compilation")
    linear_backend: str = _ignored("auto", _FIXED, "Compilation")

    mm_processor_kwargs: dict[str, Any] = _ignored({}, "the checkpoint's values are used", "Multimodal")
    mm_processor_cache_gb: float = _ignored(4.0, "images are cached by their KV blocks", "Multimodal")
    disable_mm_preprocessor_cache: bool = _ignored(False, "images are cached by KV blocks", "Multimodal")
    mm_encoder_tp_mode: str = _ignored("weights", _FIXED, "Multimodal")
    media_io_kwargs: dict[str, Any] = _ignored({}, "images are the only media", "Multimodal")
    interleave_mm_strings: bool = _ignored(False, "images keep their places in the text", "Multimodal")
    skip_mm_profiling: bool = _ignored(False, "memory is planned, not profiled", "Multimodal")

    enable_lora: bool = _ignored(False, _UNSUPPORTED, "Adapters and drafts")
    lora_modules: list[str] = _ignored([], _UNSUPPORTED, "Adapters and drafts")
    max_loras: int = _ignored(1, _UNSUPPORTED, "Adapters and drafts")
    max_lora_rank: int = _ignored(16, _UNSUPPORTED, "Adapters and drafts")
    max_cpu_loras: int | None = _ignored(None, _UNSUPPORTED, "Adapters and drafts")
    lora_dtype: str = _ignored("auto", _UNSUPPORTED, "Adapters and drafts")
    speculative_config: dict[str, Any] = _ignored({}, _UNSUPPORTED, "Adapters and drafts", short="-sc")
    spec_method: str | None = _ignored(None, _UNSUPPORTED, "Adapters and drafts")
    spec_model: str | None = _ignored(None, _UNSUPPORTED, "Adapters and drafts")
    spec_tokens: int | None = _ignored(None, _UNSUPPORTED, "Adapters and drafts")

    enable_auto_tool_choice: bool = _ignored(False, "tool calls are always recognized", "Chat")
    tool_call_parser: str | None = _ignored(None, "every form of tool call is recognized", "Chat")
    tool_parser_plugin: str = _ignored("", "no code is loaded by name", "Chat")
    tool_server: str | None = _ignored(None, "tools are run by the client", "Chat")
    enable_reasoning: bool = _ignored(False, _UNSUPPORTED, "Chat")
    reasoning_parser: str = _ignored("", _UNSUPPORTED, "Chat")
    chat_template_content_format: str = _ignored("auto", "found from the template", "Chat")
    trust_request_chat_template: bool = _ignored(False, "templates of requests are refused", "Chat")
    structured_outputs_config: dict[str, Any] = _ignored({}, "the backend is llguidance", "Chat")
    guided_decoding_backend: str | None = _ignored(None, "the backend is llguidance", "Chat")

    ssl_ciphers: str | None = _ignored(None, "the TLS library's defaults are used", "HTTP")
    enable_ssl_refresh: bool = _ignored(False, "restart to load a new certificate", "HTTP")
    middleware: list[str] = _ignored([], "no code is loaded by name", "HTTP", repeat=True)
    h11_max_incomplete_event_size: int | None = _ignored(None, "the parser is httptools", "HTTP")
    h11_max_header_count: int | None = _ignored(None, "the parser is httptools", "HTTP")
    enable_tokenizer_info_endpoint: bool = _ignored(False, "the route always exists", "HTTP")
    fingerprint_mode: str = _ignored("none", "answers carry no fingerprint", "HTTP")
    fingerprint_value: str | None = _ignored(None, "answers carry no fingerprint", "HTTP")
    tokens_only: bool = _ignored(False, _UNSUPPORTED, "HTTP")
    grpc: bool = _ignored(False, "the only protocol is HTTP", "HTTP")
    enable_per_request_metrics: bool = _ignored(False, _UNSUPPORTED, "HTTP")

    log_config_file: str | None = _ignored(None, "the log format is fixed", "Logging")
    max_log_len: int | None = _ignored(None, "prompts are never logged", "Logging")
    enable_log_outputs: bool = _ignored(False, "generated text is never logged", "Logging")
    enable_log_deltas: bool = _ignored(True, "generated text is never logged", "Logging")
    log_error_stack: bool = _ignored(False, "stacks of server faults are always logged", "Logging")
    aggregate_engine_logging: bool = _ignored(False, "there is one engine", "Logging")
    otlp_traces_endpoint: str | None = _ignored(None, _UNSUPPORTED, "Observability")
    collect_detailed_traces: list[str] = _ignored([], _UNSUPPORTED, "Observability")
    show_hidden_metrics_for_version: str | None = _ignored(None, "no metric is hidden", "Observability")
    kv_cache_metrics: bool = _ignored(False, "the metrics always exist", "Observability")
    cudagraph_metrics: bool = _ignored(False, _UNSUPPORTED, "Observability")
    enable_mfu_metrics: bool = _ignored(False, _UNSUPPORTED, "Observability")
    profiler_config: dict[str, Any] = _ignored({}, _UNSUPPORTED, "Observability")
    kv_transfer_config: dict[str, Any] = _ignored({}, _UNSUPPORTED, "Observability")
    kv_events_config: dict[str, Any] = _ignored({}, _UNSUPPORTED, "Observability")
    additional_config: dict[str, Any] = _ignored({}, "every setting has its own flag", "Observability")
