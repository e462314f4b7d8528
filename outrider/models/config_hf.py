"""Reads a checkpoint's own description into a ``ModelConfig``. Called by server and runner. No torch.

A Hugging Face folder (``config.json`` with ``generation_config.json`` and ``hf_quant_config.json``), nested
(``text_config``) or flat, in the spellings of 2025 (``rope_theta`` + ``rope_scaling``, ``torch_dtype``) and
of transformers 5 (``rope_parameters``, ``dtype``, ``layer_types``, ``moe_layers``); or one ``.gguf`` file.
Every number comes from the files; defaults are those of the Hugging Face config classes. Opens no weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.models.config import MAX_LAYERS, ModelConfig, QuantConfig, RopeScaling, VisionConfig
from outrider.models.gguf import load_gguf_config

LLAMA4_ARCHITECTURES = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")
LLAMA_ARCHITECTURES = ("LlamaForCausalLM",)
ARCHITECTURE_OF_TYPE = {
    "llama4": "Llama4ForConditionalGeneration",
    "llama4_text": "Llama4ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""For files that name no architecture."""
QUANTIZATION_FLAGS = {"FP8": "modelopt", "NVFP4": "modelopt_fp4"}
GENERATION_RANGES = {
    "do_sample": (0, 1),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "max_new_tokens": (1, 2**31 - 1),
}
GENERATION_KEYS = tuple(name for name in GENERATION_RANGES if name != "max_new_tokens")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def load_model_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint folder or a ``.gguf`` file; ``ConfigError`` says which key is wrong."""
    path = Path(path)
    if path.suffix == ".gguf":
        return load_gguf_config(path)
    raw = _read_json(path / "config.json")
    if raw is None:
        raise ConfigError(f"{path} has no config.json; give a checkpoint folder, a .gguf file or a hub id.")
    try:
        return parse_hf_config(
            raw,
            generation=_read_json(path / "generation_config.json"),
            hf_quant=_read_json(path / "hf_quant_config.json"),
        )
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError) as error:
        raise ConfigError(
            f"{path}: config.json has a value of the wrong kind ({str(error)[:200]})."
        ) from error


def check_quantization(flag: str | None, config: ModelConfig) -> None:
    """Refuse (``ConfigError``) a ``--quantization`` that the checkpoint does not hold (in any case)."""
    if flag is None:
        return
    actual = QUANTIZATION_FLAGS[config.quant.algo] if config.quant else None
    if flag.lower() not in QUANTIZATION_FLAGS.values():
        known = ", ".join(QUANTIZATION_FLAGS.values())
        raise ConfigError(f"--quantization {flag} is not known; use one of {known}, or leave it out.")
    if flag.lower() != actual:
        held = f"{config.quant.algo} ({actual})" if config.quant else "unquantized weights"
        raise ConfigError(
            f"--quantization {flag} was asked for, but the checkpoint holds {held}: change or drop it."
        )


def parse_hf_config(
    raw: dict[str, Any], generation: dict[str, Any] | None = None, hf_quant: dict[str, Any] | None = None
) -> ModelConfig:
    """The config of the parsed ``config.json`` and, where present, its two companions."""
    generation = generation or {}
    named = raw.get("architectures") or [ARCHITECTURE_OF_TYPE.get(str(raw.get("model_type")))]
    architecture = named[0]
    text = raw.get("text_config") or raw
    quant = parse_quantization(
        raw.get("quantization_config") or text.get("quantization_config") or hf_quant or None
    )
    if architecture in LLAMA4_ARCHITECTURES:
        return _parse_llama4(architecture, raw, text, generation, quant)
    if architecture in LLAMA_ARCHITECTURES:
        return _parse_llama(architecture, text, generation, quant)
    served = ", ".join(LLAMA4_ARCHITECTURES + LLAMA_ARCHITECTURES)
    raise ConfigError(f"config.json names the architecture {architecture}; only these are served: {served}.")


def parse_quantization(raw: dict[str, Any] | None) -> QuantConfig | None:
    """ModelOpt's metadata, from ``quantization_config`` (flat) or ``hf_quant_config.json`` (nested)."""
    if raw is None:
        return None
    method = str(raw.get("quant_method") or (raw.get("producer") or {}).get("name") or "modelopt").lower()
    inner = raw.get("quantization") or raw
    algo = str(inner.get("quant_algo")).upper()
    if method != "modelopt" or algo not in QUANTIZATION_FLAGS:
        raise ConfigError(
            f"The checkpoint's quantization is {method}/{algo}; only modelopt's FP8 and NVFP4 are served."
        )
    scheme = inner.get("kv_cache_scheme") or {}
    kv_algo = inner.get("kv_cache_quant_algo") or ("FP8" if scheme.get("num_bits") == 8 else None)
    if kv_algo is not None and str(kv_algo).upper() != "FP8":
        raise ConfigError(f"The checkpoint's KV cache quantization is {kv_algo}; only FP8 is served.")
    return QuantConfig(
        algo=algo,
        kv_cache_algo="FP8" if kv_algo else None,
        group_size=16 if algo == "NVFP4" else None,
        ignore=tuple(inner.get("exclude_modules") or inner.get("ignore") or ()),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold one JSON object.")
    return value


def _parse_llama4(
    architecture: str,
    raw: dict[str, Any],
    text: dict[str, Any],
    generation: dict[str, Any],
    quant: QuantConfig | None,
) -> ModelConfig:
    num_layers = _num_layers(text, 48)
    chunk = text.get("attention_chunk_size", 8192)
    theta, scaling = _parse_rope(text, default_theta=500000.0)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(text.get("vocab_size", 202048)),
        hidden_size=int(text.get("hidden_size", 5120)),
        num_layers=num_layers,
        num_heads=int(text.get("num_attention_heads", 40)),
        num_kv_heads=int(text.get("num_key_value_heads", 8)),
        head_dim=int(text.get("head_dim") or 128),
        intermediate_size=int(text.get("intermediate_size", 8192)),
        intermediate_size_mlp=int(text.get("intermediate_size_mlp", 16384)),
        num_experts=int(text.get("num_local_experts", 16)),
        num_experts_per_tok=int(text.get("num_experts_per_tok", 1)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=int(text.get("max_position_embeddings", 131072)),
        rope_layers=_rope_layers(text, num_layers),
        moe_layers=_moe_layers(text, num_layers),
        interleaved_rope=True,
        attention_chunk_size=int(chunk) if chunk else None,
        use_qk_norm=bool(text.get("use_qk_norm", True)),
        # Early files hold the integer 4 here: any true value means "on".
        attn_temperature_tuning=bool(text.get("attn_temperature_tuning", True)),
        floor_scale=float(text.get("floor_scale", 8192)),
        attn_scale=float(text.get("attn_scale", 0.1)),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        vision=_parse_vision(raw.get("vision_config")),
        image_token_id=_image_token(raw, "image", 200092),
        boi_token_id=_image_token(raw, "boi", 200080),
        eoi_token_id=_image_token(raw, "eoi", 200081),
        quant=quant,
        **_common(raw, text, generation, default_eps=1e-5),
    )


def _parse_llama(
    architecture: str, text: dict[str, Any], generation: dict[str, Any], quant: QuantConfig | None
) -> ModelConfig:
    if text.get("mlp_bias"):
        raise ConfigError("config.json asks for mlp_bias, which is not served: use a checkpoint without it.")
    num_layers = _num_layers(text, 32)
    num_heads = int(text.get("num_attention_heads", 32))
    hidden_size = int(text.get("hidden_size", 4096))
    theta, scaling = _parse_rope(text, default_theta=10000.0)
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(text.get("vocab_size", 32000)),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=int(text.get("head_dim") or hidden_size // num_heads),
        intermediate_size=int(text.get("intermediate_size", 11008)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=int(text.get("max_position_embeddings", 2048)),
        rope_layers=(True,) * num_layers,
        moe_layers=(False,) * num_layers,
        interleaved_rope=False,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        quant=quant,
        **_common(text, text, generation, default_eps=1e-6),
    )


def _common(
    raw: dict[str, Any], text: dict[str, Any], generation: dict[str, Any], default_eps: float
) -> dict[str, Any]:
    """What every architecture spells the same way."""
    act = text.get("hidden_act", "silu")
    if act != "silu":
        raise ConfigError(f"config.json names hidden_act {act}; only silu is served.")
    dtype = str(
        text.get("dtype")
        or text.get("torch_dtype")
        or raw.get("dtype")
        or raw.get("torch_dtype")
        or "bfloat16"
    ).removeprefix("torch.")
    return {
        "rms_norm_eps": float(text.get("rms_norm_eps", default_eps)),
        "attention_bias": bool(text.get("attention_bias", False)),
        "dtype": DTYPE_ALIASES.get(dtype, dtype),
        "bos_token_id": _optional_int(generation.get("bos_token_id", text.get("bos_token_id"))),
        "eos_token_ids": _eos_ids(generation.get("eos_token_id"), text.get("eos_token_id")),
        "pad_token_id": _optional_int(generation.get("pad_token_id", text.get("pad_token_id"))),
        "generation": generation_values({name: generation.get(name) for name in GENERATION_KEYS}),
    }


def generation_values(raw: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults among a ``generation_config.json``'s values; ``ConfigError`` for one out of its range."""
    values = {name: raw[name] for name in GENERATION_RANGES if raw.get(name) is not None}
    for name, value in values.items():
        low, high = GENERATION_RANGES[name]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"generation_config.json: {name} must be a number from {low} to {high}.")
    return values


def _num_layers(raw: dict[str, Any], default: int) -> int:
    count = int(raw.get("num_hidden_layers", default))
    if not 1 <= count <= MAX_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers must be from 1 to {MAX_LAYERS}.")
    return count


def _rope_layers(text: dict[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Which layers rotate (and see only their chunk). In ``no_rope_layers`` a 1 means "uses rope"."""
    interval = int(text.get("no_rope_layer_interval") or 4)
    flags = text.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(num_layers)]
    layers = tuple(bool(flag) for flag in flags)
    kinds = text.get("layer_types")
    if len(layers) != num_layers or (kinds and len(kinds) != num_layers):
        raise ConfigError(f"no_rope_layers and layer_types must have {num_layers} entries, one per layer.")
    if kinds and layers != tuple(kind == "chunked_attention" for kind in kinds):
        raise ConfigError(
            "layer_types and no_rope_layers disagree: chunked_attention must be the layers with rope."
        )
    return layers


def _moe_layers(text: dict[str, Any], num_layers: int) -> tuple[bool, ...]:
    step = int(text.get("interleave_moe_layer_step") or 1)
    listed = text.get("moe_layers")
    chosen = set(range(step - 1, num_layers, step) if listed is None else listed)
    if not all(isinstance(i, int) and 0 <= i < num_layers for i in chosen):
        raise ConfigError(f"moe_layers must be layer indices below {num_layers}.")
    return tuple(i in chosen for i in range(num_layers))


def _parse_rope(text: dict[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """``(theta, scaling)`` from ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling``."""
    params = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = float(params.get("rope_theta") or text.get("rope_theta") or default_theta)
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"config.json asks for rope_type {kind}; only default and llama3 are served.")
    try:
        scaling = RopeScaling(
            factor=float(params["factor"]),
            low_freq_factor=float(params["low_freq_factor"]),
            high_freq_factor=float(params["high_freq_factor"]),
            original_max_position_embeddings=int(params["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ConfigError(f"rope_scaling of type llama3 lacks the key {error.args[0]}.") from error
    return theta, scaling


def _parse_vision(raw: dict[str, Any] | None) -> VisionConfig | None:
    if not raw:
        return None
    theta = float((raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if raw.get("multi_modal_projector_bias"):
        raise ConfigError("vision_config asks for multi_modal_projector_bias, which is not served.")
    return VisionConfig(
        hidden_size=int(raw.get("hidden_size", 768)),
        num_layers=_num_layers(raw, 34),
        num_heads=int(raw.get("num_attention_heads", 16)),
        intermediate_size=int(raw.get("intermediate_size", 5632)),
        image_size=int(raw.get("image_size", 448)),
        patch_size=int(raw.get("patch_size", 14)),
        pixel_shuffle_ratio=float(raw.get("pixel_shuffle_ratio", 0.5)),
        projector_input_dim=int(raw.get("projector_input_dim", 4096)),
        projector_output_dim=int(raw.get("projector_output_dim", 4096)),
        rope_theta=theta,
        norm_eps=float(raw.get("norm_eps", 1e-5)),
        num_channels=int(raw.get("num_channels", 3)),
    )


def _image_token(raw: dict[str, Any], kind: str, default: int) -> int | None:
    """A token id around images, in either spelling; None for a model that sees none and names none."""
    value = raw.get(f"{kind}_token_index", raw.get(f"{kind}_token_id"))
    return _optional_int(default if value is None and raw.get("vision_config") else value)


def _optional_int(value: Any) -> int | None:
    """An id; of a list the first entry."""
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _eos_ids(*sources: Any) -> tuple[int, ...]:
    """Every stop id of ``generation_config.json``, then those that only ``config.json`` names."""
    ids: list[int] = []
    for source in sources:
        for value in source if isinstance(source, list) else [source]:
            if value is not None and int(value) not in ids:
                ids.append(int(value))
    return tuple(ids)
