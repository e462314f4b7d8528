"""A whole MoE layer for a few tokens, in three launches: norm and route, gate and up, down; FP8, one expert a token.

Called by ``quant.few_rows`` for steps of at most ``FEW_ROWS`` tokens, where every launch and every half-empty wave
counts. All rows fit one tile, so nothing is sorted: each chosen expert multiplies all rows and keeps its own. The
shared expert is one more expert of the same launches. Larger steps take ``moe`` and the dense linears instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import arrival_counters, ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.activation import swiglu
from outrider.kernels.gemm import fp8_linear_reference
from outrider.kernels.gemv import GemvTile, down_one_triton
from outrider.kernels.moe import moe_fp8_reference, route_reference
from outrider.kernels.moe_few_kernels import (
    FEW_ROWS,
    FEW_TILES,
    _few_down_kernel,
    _few_gate_up_kernel,
)
from outrider.kernels.moe_few_one import _gate_up_one_kernel
from outrider.kernels.moe_few_route import _norm_route_kernel, route_options
from outrider.kernels.moe_gemm import TRITON_DTYPES, Tile
from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.overlap import overlap_options
from outrider.kernels.quantize import quantize_fp8_reference

DOWN_ONE_TILE: GemvTile | None = GemvTile(1, 2048, 4)
"""For the second products of one token; None: the table's.

H200, 2026-11-26, a whole layer of one token: 89.9 us, with other sizes 90.9 to 96.2: trials_h200.txt
"""

UP_ONE_TILE: GemvTile | None = GemvTile(1, 1024, 2)
"""For the first products of one token, ``outputs`` pairs of a gate and an up row; None: the table's.

H200, 2026-11-26, a whole layer of one token: 90.9 us, with other sizes 91.9 to 93.9, with the table's tile 99.8:
trials_h200.txt
"""


class NormWeights(NamedTuple):
    """The RMS norm before the layer: ``weight [M]`` in the model dtype, and its epsilon."""

    weight: torch.Tensor
    eps: float


class ExpertWeights(NamedTuple):
    """The routed experts, as ``moe_fp8`` takes them; ``expert_range`` = (first, count) held here."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    a13_scale: torch.Tensor
    a2_scale: torch.Tensor
    expert_range: tuple[int, int]


class SharedWeights(NamedTuple):
    """The shared expert: two FP8 linears, ``gate_up`` e4m3 [2I, M] and ``down`` e4m3 [M, I], with their scales."""

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    input_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor
    down_input_scale: torch.Tensor


def moe_few(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: ExpertWeights,
    shared: SharedWeights,
) -> torch.Tensor:
    """``shared(y) + expert(sigmoid(logit) · y) -> [T, M]`` with ``y = norm(x + residual)``, T at most ``FEW_ROWS``.

    ``x`` and ``residual`` [T, M], ``router`` [E, M] in the model dtype. The sum replaces ``residual``.
    """
    op = moe_few_triton if on_gpu(x) else moe_few_reference
    return op(x, residual, norm, router, experts, shared)


def moe_few_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: ExpertWeights,
    shared: SharedWeights,
) -> torch.Tensor:
    """The contract of ``moe_few``, composed of the references of the ops that it replaces."""
    x = rms_norm_reference(x, norm.weight, norm.eps, residual).y
    expert_ids, scores = route_reference(F.linear(x, router), 1)
    routed = moe_fp8_reference(x, expert_ids, scores, *experts)
    codes = quantize_fp8_reference(x, shared.input_scale)
    gate_up = fp8_linear_reference(codes, shared.gate_up, shared.input_scale, shared.gate_up_scale, x.dtype)
    codes = quantize_fp8_reference(swiglu(gate_up), shared.down_input_scale)
    return (
        fp8_linear_reference(codes, shared.down, shared.down_input_scale, shared.down_scale, x.dtype) + routed
    )


@dataclass(frozen=True)
class _FewRows:
    """Rows to multiply: ``x`` e4m3 [2 · FEW_ROWS, M], scaled rows first; local expert of each token, or -1."""

    x: torch.Tensor
    expert_ids: torch.Tensor


def norm_route_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: ExpertWeights,
    shared: SharedWeights,
) -> _FewRows:
    """Add ``x[T, M]`` to ``residual``, normalise, route by ``router[E, M]``, quantise for both kinds of expert."""
    num_tokens, size = x.shape
    rows = torch.empty((2 * FEW_ROWS, size), dtype=torch.float8_e4m3fn, device=x.device)
    expert_ids = torch.empty(num_tokens, dtype=torch.int32, device=x.device)
    _norm_route_kernel[(num_tokens,)](
        x,
        residual,
        norm.weight,
        router,
        experts.a13_scale,
        shared.input_scale,
        rows,
        None,
        expert_ids,
        x.stride(0),
        residual.stride(0),
        norm.eps,
        *experts.expert_range,
        EXPERTS=router.shape[0],
        ROWS=FEW_ROWS,
        QUANTIZE=True,
        ROOT=0.0,
        **route_options(size),
        **overlap_options(x.device, num_tokens),
    )
    return _FewRows(rows, expert_ids)


def moe_few_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: ExpertWeights,
    shared: SharedWeights,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """``moe_few`` as three Triton launches; ``tiles`` overrides ``FEW_TILES``."""
    num_tokens = x.shape[0]
    up_tile, down_tile = tiles or FEW_TILES
    rows = norm_route_triton(x, residual, norm, router, experts, shared)
    lone = num_tokens == 1 and tiles is None
    if lone and UP_ONE_TILE is not None and UP_ONE_TILE.takes(x.shape[1], pairs=True):
        hidden, shared_hidden = gate_up_one_triton(rows, experts, shared, x, UP_ONE_TILE)
    else:
        hidden, shared_hidden = few_gate_up_triton(rows, experts, shared, x, up_tile)
    depths = (experts.w2.shape[2], shared.down.shape[1])
    one = DOWN_ONE_TILE
    if lone and one is not None and all(one.takes(depth) for depth in depths):
        return down_one_triton(
            hidden, shared_hidden, rows.expert_ids, experts.w2, experts.a2_scale, experts.w2_scale,
            shared.down, shared.down_input_scale, shared.down_scale, x.dtype, one,
        )  # fmt: skip
    return few_down_triton(rows, hidden, shared_hidden, experts, shared, x, down_tile)


def _gate_up_outputs(
    rows: _FewRows,
    experts: ExpertWeights,
    shared: SharedWeights,
    hidden: torch.Tensor,
    shared_hidden: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Where the first products go, who the expert is, and all scales: what both of their kernels take."""
    return (
        hidden,
        shared_hidden,
        rows.expert_ids,
        experts.a13_scale,
        experts.w13_scale,
        experts.a2_scale,
        shared.input_scale,
        shared.gate_up_scale,
        shared.down_input_scale,
    )


def gate_up_one_triton(
    rows: _FewRows, experts: ExpertWeights, shared: SharedWeights, x: torch.Tensor, tile: GemvTile
) -> tuple[torch.Tensor, torch.Tensor]:
    """``few_gate_up_triton`` of one token: the first rows of its results."""
    inter, shared_inter = experts.w13.shape[1] // 2, shared.gate_up.shape[0] // 2
    hidden = rows.x.new_empty((1, inter))
    shared_hidden = rows.x.new_empty((1, shared_inter))
    programs = ceil_div(shared_inter, tile.outputs) + ceil_div(inter, tile.outputs)
    _gate_up_one_kernel[(programs,)](
        rows.x,
        experts.w13,
        shared.gate_up,
        *_gate_up_outputs(rows, experts, shared, hidden, shared_hidden),
        inter,
        shared_inter,
        MODEL_DTYPE=TRITON_DTYPES[x.dtype],
        DEPTH=x.shape[1],
        ROWS=FEW_ROWS,
        OUTPUTS=tile.outputs,
        STEP=tile.step,
        num_warps=tile.warps,
        **overlap_options(x.device, 1),
    )
    return hidden, shared_hidden


def few_gate_up_triton(
    rows: _FewRows, experts: ExpertWeights, shared: SharedWeights, x: torch.Tensor, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised SwiGLU rows ``[FEW_ROWS, I]`` of the chosen experts and of the shared expert."""
    num_tokens, depth = x.shape
    num_local, double_inter, _ = experts.w13.shape
    inter, shared_inter = double_inter // 2, shared.gate_up.shape[0] // 2
    hidden = rows.x.new_empty((FEW_ROWS, inter))
    shared_hidden = rows.x.new_empty((FEW_ROWS, shared_inter))
    weight_block = [tile.outputs, tile.depth]
    most_chosen = min(num_tokens, num_local)
    programs = ceil_div(shared_inter, tile.outputs) + most_chosen * ceil_div(inter, tile.outputs)
    _few_gate_up_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows.x, [FEW_ROWS, tile.depth]),
        TensorDescriptor.from_tensor(experts.w13.view(-1, depth), weight_block),
        TensorDescriptor.from_tensor(shared.gate_up, weight_block),
        *_gate_up_outputs(rows, experts, shared, hidden, shared_hidden),
        num_tokens,
        inter,
        shared_inter,
        depth,
        MODEL_DTYPE=TRITON_DTYPES[x.dtype],
        ROWS=FEW_ROWS,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        BINS=power_of_two_at_least(num_local, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap_options(x.device, num_tokens),
    )
    return hidden, shared_hidden


def few_down_triton(
    rows: _FewRows,
    hidden: torch.Tensor,
    shared_hidden: torch.Tensor,
    experts: ExpertWeights,
    shared: SharedWeights,
    x: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """``[T, M]``: the second products of both kinds of expert, added."""
    num_tokens, size = x.shape
    num_local = experts.w2.shape[0]
    out = torch.empty_like(x)
    partial = torch.empty((2, tile.split_k, FEW_ROWS, size), dtype=torch.float32, device=x.device)
    row_block, weight_block = [FEW_ROWS, tile.depth], [tile.outputs, tile.depth]
    programs = (1 + min(num_tokens, num_local)) * ceil_div(size, tile.outputs) * tile.split_k
    _few_down_kernel[(programs,)](
        TensorDescriptor.from_tensor(hidden, row_block),
        TensorDescriptor.from_tensor(shared_hidden, row_block),
        TensorDescriptor.from_tensor(experts.w2.view(-1, hidden.shape[1]), weight_block),
        TensorDescriptor.from_tensor(shared.down, weight_block),
        out,
        partial,
        arrival_counters(x.device),
        rows.expert_ids,
        experts.a2_scale,
        experts.w2_scale,
        shared.down_input_scale,
        shared.down_scale,
        num_tokens,
        size,
        hidden.shape[1],
        shared_hidden.shape[1],
        SPLIT_K=tile.split_k,
        ROWS=FEW_ROWS,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        BINS=power_of_two_at_least(num_local, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **overlap_options(x.device, num_tokens),
    )
    return out
