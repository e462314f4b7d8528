"""Products and attention whose bits for a token do not depend on what else is in the step: ``--deterministic``.

The rank's start turns it on, once for the process. The libraries behind a product choose kernels by the number of
rows, so here every product has ``ROWS`` of them: more are cut, fewer are padded. Attention takes every query by
itself, over exactly the keys it sees, as if each token were a decode; so chunk borders, prefix hits and preemption
change nothing either. On a GPU the kernels of this package ask ``is_invariant`` and take one tile and one split for
any number of rows: a row of a tile is a chain of sums of its own, the same in every place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROWS = 16
"""Rows of every product: decode pays for up to 15 unused ones, a long prefill for smaller products."""

NUM_SPLITS = 8
"""Parts of a context that decode attention reads side by side on a GPU, whatever their length.

Neither is tuned. H200, 2026-11-27, 120 prompts: 1.56 times an ordinary run's time together, 1.59 one by one:
benchmarks/results/determinism_h200.json
"""

_is_on = False

_LINEARS = (F.linear, torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._linear_pointwise.default)


def make_invariant(device: torch.device) -> None:
    """Turn it on for the calling thread's steps, for the life of the process."""
    global _is_on
    _is_on = True
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:  # what cuBLAS still multiplies is summed in one order on every stream
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    InvariantProducts().__enter__()


def is_invariant() -> bool:
    """Whether this process computes each token as if it were alone."""
    return _is_on


class InvariantProducts(TorchFunctionMode):
    """While entered, every linear product of torch is made of blocks of ``ROWS`` rows."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Cut up linear products; everything else is left as it is."""
        if func in _LINEARS:
            return _in_blocks(func, args[0], args[1:], kwargs or {})
        return func(*args, **(kwargs or {}))


def _in_blocks(
    func: Callable[..., torch.Tensor], x: torch.Tensor, rest: Sequence[Any], kwargs: dict[str, Any]
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = by_blocks(lambda block: (func(block, *rest, **kwargs),), rows)[0]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def by_blocks(op: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``op`` on ``ROWS`` rows of the inputs at a time, the last ones padded with zeros; its results, put together."""
    num_rows = len(inputs[0])
    missing = -num_rows % ROWS
    if missing:
        inputs = tuple(torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) for x in inputs)
    parts = [op(*(x[i : i + ROWS].contiguous() for x in inputs)) for i in range(0, len(inputs[0]), ROWS)]
    if not parts:
        return tuple(y[:0] for y in op(*(x.new_zeros((ROWS, *x.shape[1:])) for x in inputs)))
    joined = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
    return tuple(y[:num_rows] for y in joined)


def attend_each(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, chunk_size: int | None, sm_scale: float
) -> torch.Tensor:
    """``[n, H, D]`` for the last n tokens of one sequence, each over the keys it sees.

    ``q [n, H, D]``; ``k``, ``v`` ``[1, K, L, D]`` hold positions ``first`` to the sequence's last.
    """
    num_queries, num_heads, head_dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    rows = q.reshape(num_queries, 1, kv_heads, num_heads // kv_heads, head_dim)
    out = torch.empty_like(rows)
    for i in range(num_queries):
        position = first + num_keys - num_queries + i
        begin = position // chunk_size * chunk_size if chunk_size else 0
        seen = slice(begin - first, position + 1 - first)
        out[i] = F.scaled_dot_product_attention(rows[i], k[:, :, seen], v[:, :, seen], scale=sm_scale)
    return out.reshape(num_queries, num_heads, head_dim)
