"""Rows of the embedding table, which on a GPU may stay in pinned host memory: a step reads a few of 200,000.

Called by the models' embedding layer. The kernel reads such a table over the bus (unified addressing), also within a
CUDA graph: 10 KB a token of Scout, whose table would take the room of 21,000 tokens of KV cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import on_gpu, power_of_two_at_least


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``table[token_ids]``: int64 ``[T]`` ids below V, table ``[V, M]``, result ``[T, M]`` on the device of the ids.

    ``table`` is on that device or, for a GPU, in pinned host memory.
    """
    return embedding_triton(token_ids, table) if on_gpu(token_ids) else embedding_reference(token_ids, table)


def embedding_reference(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Plain-torch ``embedding``, looked up where the table is."""
    return F.embedding(token_ids.to(table.device), table).to(token_ids.device)


@triton.jit
def _embedding_kernel(ids_ptr, table_ptr, out_ptr, row_size, BLOCK: tl.constexpr):
    """One program copies one row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < row_size
    row = tl.load(ids_ptr + token)
    tl.store(
        out_ptr + token * row_size + columns,
        tl.load(table_ptr + row * row_size + columns, mask=mask),
        mask=mask,
    )


def embedding_triton(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Launch one program a token.

    Its block and warps are not tuned. H200, 2026-11-26, a table in host memory: 0.1 ms for 512 tokens, 51 GB/s over the
    bus (docs/log.md).
    """
    num_tokens, row_size = len(token_ids), table.shape[1]
    out = torch.empty((num_tokens, row_size), dtype=table.dtype, device=token_ids.device)
    if num_tokens:
        block = power_of_two_at_least(row_size, 128)
        _embedding_kernel[(num_tokens,)](
            token_ids, table, out, row_size, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
    return out


AOT_SPECS = [
    (
        _embedding_kernel,
        {"ids_ptr": "*i64", "table_ptr": "*bf16", "out_ptr": "*bf16", "row_size": "i32"},
        {"BLOCK": 8192},
        {"num_warps": 16},
    )
]
