"""Every setting, once: two frozen dataclasses whose fields are the flags, the YAML keys and the docs.

A field carries its help text, choices and group in ``metadata`` (see ``option``). The command line, ``--config``
files, ``docs/flags.md`` and the JSON schema are all generated from here. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with what its flag needs: ``help``, and optionally ``choices``, ``group``, ``short``, ``parse``, ``no_effect``."""
    meta = {"help": help, **metadata}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine process needs to know; crosses to it as msgpack."""

    model: str = option(
        "", "Local folder, .gguf file or hub id; empty means the embedded SmolLM2-135M-Instruct"
    )
    dtype: str = option(
        "auto",
        "Arithmetic type of weights and activations",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    quantization: str | None = option(
        None, "Quantization the checkpoint must have (read from it when absent)", short="-q"
    )
    kv_cache_dtype: str = option(
        "auto", "Type of the KV cache", choices=("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3")
    )
    load_format: str = option(
        "auto",
        "'dummy' makes random weights from config.json alone",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    device: str = option("auto", "Where to run", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "Seed of sampling for requests without their own")
    max_model_len: int | None = option(None, "Longest prompt plus output in tokens; default: the model's")
    max_num_seqs: int | None = option(
        None, "Most sequences running at once (default 512 on a GPU, 64 on a CPU)"
    )
    max_num_batched_tokens: int | None = option(
        None, "Most tokens computed in a step (default 8192 on a GPU, 512 on a CPU)"
    )
    block_size: int | None = option(None, "Tokens in a KV cache block (default 64 on a GPU, 16 on a CPU)")
    gpu_memory_utilization: float = option(
        0.9, "Share of the GPU's memory for weights, activations and KV cache"
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Size of the KV cache, instead of what utilization leaves"
    )
    num_gpu_blocks_override: int | None = option(
        None, "Number of KV cache blocks, instead of what memory allows"
    )
    enable_prefix_caching: bool = option(True, "Share the KV cache of equal prompt beginnings")
    enable_chunked_prefill: bool = option(True, "Split long prompts over steps")
    async_scheduling: bool = option(True, "Launch the next step before reading the last one's tokens")
    enforce_eager: bool = option(False, "Never use CUDA graphs")
    tensor_parallel_size: int = option(1, "GPUs that share each layer", short="-tp")
    pipeline_parallel_size: int = option(1, "GPUs that share the stack of layers", short="-pp")
    enable_expert_parallel: bool = option(
        False, "Split MoE layers by expert instead of by column", short="-ep"
    )
    max_logprobs: int = option(20, "Most alternatives a request may ask for (-1: no limit)")
    scheduling_policy: str = option("fcfs", "Order of the waiting queue", choices=("fcfs", "priority"))
    revision: str | None = option(None, "Revision of the model on the hub")
    download_dir: str | None = option(None, "Where hub downloads go (default: the hub cache)")
    language_model_only: bool = option(False, "Do not load the vision tower; images are refused")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP front end needs to know."""

    host: str | None = option(None, "Address to bind (default: all interfaces)")
    port: int = option(8000, "TCP port")
    served_model_name: list[str] = option([], "Names the model answers to; the first is reported")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer (default: the model's)")
    chat_template: str | None = option(
        None, "File or one-line Jinja template for chat (default: the checkpoint's)"
    )
    api_key: list[str] = option([], "Keys that clients must send as 'Authorization: Bearer KEY'")
