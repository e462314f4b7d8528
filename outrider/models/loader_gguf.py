"""The weights of a GGUF file under canonical names, dequantised. Called by ``registry``; see ``gguf`` for the header.

Q4_1, Q8_0 and the other ggml formats become float32 through the ``gguf`` package. Keeping Q4_1 in four bits
was measured and rejected: torch's int4 GEMM with float32 activations is a scalar loop, 10 to 60 times slower
than the float32 GEMM at 1 to 64 rows (K 576, N 3072, 2 cores, torch 2.13).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch

from outrider.errors import CheckpointError
from outrider.models.gguf import GgufTensor, read_gguf_header

_PLAIN_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def canonical_gguf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` to ``layers.3.self_attn.q_proj.weight``; unknown names stay as they are."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return _PLAIN_NAMES.get(name, name)


class GgufFile:
    """A memory-mapped GGUF file; implements ``loader.WeightFile``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = read_gguf_header(path)[1]
        self.tensors: dict[str, GgufTensor] = {canonical_gguf_name(n): t for n, t in tensors.items()}
        self.full_names = {canonical_gguf_name(name): name for name in tensors}
        self.data = np.memmap(path, dtype=np.uint8, mode="r")

    def names(self) -> Iterable[str]:
        """See ``WeightFile``."""
        return self.tensors

    def full_name(self, name: str) -> str:
        """See ``WeightFile``; an absent tensor keeps its canonical name."""
        return self.full_names.get(name, name)

    def dtype_of(self, name: str) -> str | None:
        """See ``WeightFile``: every tensor is read as float32."""
        return "F32" if name in self.tensors else None

    def shape_of(self, name: str) -> tuple[int, ...]:
        """See ``WeightFile``."""
        return self.tensors[name].shape

    def read(self, name: str, select: tuple[slice, ...]) -> torch.Tensor:
        """See ``WeightFile``. Rows that are not selected are not dequantised."""
        tensor = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"Tensor {name} has the unknown GGUF type {tensor.type_id}.") from error
        row_bytes = tensor.shape[-1] // block * block_bytes
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        end = tensor.offset + num_rows * row_bytes
        if end > self.data.size:
            raise CheckpointError(f"{self.path} ends before tensor {name}: download it again.")
        raw = self.data[tensor.offset : end].reshape(*tensor.shape[:-1], row_bytes)
        rows, columns = (select[:1], select[1:]) if len(tensor.shape) > 1 else ((), select)
        part = raw[rows[0]] if rows else raw
        values = torch.from_numpy(_dequantize(part, kind))
        return values[(slice(None),) * (values.dim() - 1) + columns] if columns else values


def _dequantize(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """float32 of the rows of bytes ``raw``, in memory of its own."""
    if kind == gguf.GGMLQuantizationType.F32:
        return np.array(raw).view(np.float32)
    values: np.ndarray = gguf.dequantize(raw, kind)
    return values
