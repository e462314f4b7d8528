"""A whole MoE layer for one token in three launches, with repacked NVFP4 experts and a shared expert of FP8 rows.

Called by ``quant.few_rows`` on the devices whose NVFP4 weights are kept so (``nvfp4_path``). Weight-only: activations
stay in the model dtype, nothing is quantised, and weights are exact but for what ``nvfp4_repack`` rounds. All products
run without tensor cores: one row would leave 15 of 16 of their rows empty. More tokens take ``moe_nvfp4_repacked``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from outrider.kernels._dispatch import ceil_div, interpreted, on_gpu
from outrider.kernels.activation import swiglu
from outrider.kernels.moe import route_reference
from outrider.kernels.moe_few import NormWeights
from outrider.kernels.moe_few_route import _norm_route_kernel, route_options
from outrider.kernels.moe_gemm import TRITON_DTYPES
from outrider.kernels.moe_one_kernels import ONE_TILE, OneTile, _one_down_kernel, _one_gate_up_kernel
from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.nvfp4_repack import CHUNK, unpack_reference
from outrider.kernels.nvfp4_row import SCALE_SHIFT
from outrider.kernels.overlap import overlap_options


class Nvfp4ExpertWeights(NamedTuple):
    """Routed experts as ``repack_nvfp4_`` leaves them; ``expert_range`` = (first, count) held here.

    ``w13`` u8 [E, 2I, M/2], gated, ``w2`` u8 [E, M, I/2]; block scales e4m3 [E, 2I, M/16] and [E, M, I/16]; an f32
    scale of one element each.
    """

    w13: torch.Tensor
    w13_block_scale: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_block_scale: torch.Tensor
    w2_scale: torch.Tensor
    expert_range: tuple[int, int]


class SharedRows(NamedTuple):
    """The shared expert: ``gate_up`` e4m3 [2J, M] and ``down`` e4m3 [M, J], an f32 scale a row of each."""

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor
    down: torch.Tensor
    down_scale: torch.Tensor


def one_token_fits(hidden: int, shared_inter: int) -> bool:
    """Whether rows of these sizes divide as the kernels want; of the routed experts ``can_repack`` says it."""
    return hidden % CHUNK == 0 and shared_inter % CHUNK == 0


def moe_one(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: Nvfp4ExpertWeights,
    shared: SharedRows,
) -> torch.Tensor:
    """``shared(y) + expert(sigmoid(logit) · y) -> [1, M]`` with ``y = norm(x + residual)``.

    ``x`` and ``residual`` [1, M], ``router`` [E, M] in the model dtype. The sum replaces ``residual``.
    """
    op = moe_one_triton if on_gpu(x) else moe_one_reference
    return op(x, residual, norm, router, experts, shared)


def moe_one_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: Nvfp4ExpertWeights,
    shared: SharedRows,
) -> torch.Tensor:
    """The contract of ``moe_one_nvfp4`` in plain torch: float32 products, rounded where the separate ops round."""
    y = rms_norm_reference(x, norm.weight, norm.eps, residual).y
    expert_ids, scores = route_reference(F.linear(y, router), 1)

    def product(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(row.float(), weight).to(x.dtype)

    gate_up = product(y, shared.gate_up.float() * shared.gate_up_scale[:, None])
    out = product(swiglu(gate_up), shared.down.float() * shared.down_scale[:, None])
    local = int(expert_ids[0, 0]) - experts.expert_range[0]
    if not 0 <= local < experts.expert_range[1]:
        return out
    w13 = unpack_reference(experts.w13[local], experts.w13_block_scale[local], gated=True) * experts.w13_scale
    w2 = unpack_reference(experts.w2[local], experts.w2_block_scale[local], gated=False) * experts.w2_scale
    scaled = (y.float() * scores.float()).to(x.dtype)
    return out + product(swiglu(product(scaled, w13)), w2)


@dataclass(frozen=True)
class _OneRow:
    """The normed row: ``x`` f32 [M] in planes, the scaled row as half blocks, its local expert or -1."""

    x: torch.Tensor
    half: torch.Tensor
    half_scale: torch.Tensor
    expert_id: torch.Tensor


def norm_route_one_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    expert_range: tuple[int, int],
) -> _OneRow:
    """Add ``x[1, M]`` to ``residual``, normalise, route by ``router[E, M]``; the row in planes and as half blocks."""
    size = x.shape[1]
    row = torch.empty(size, dtype=torch.float32, device=x.device)
    half, half_scale = _empty_half_blocks(size, x.device)
    expert_id = torch.empty(1, dtype=torch.int32, device=x.device)
    _norm_route_kernel[(1,)](
        x,
        residual,
        norm.weight,
        router,
        half_scale,
        None,
        row,
        half,
        expert_id,
        x.stride(0),
        residual.stride(0),
        norm.eps,
        *expert_range,
        EXPERTS=router.shape[0],
        ROWS=1,
        QUANTIZE=False,
        ROOT=math.sqrt(size),
        **route_options(size),
        **overlap_options(x.device, 1),
    )
    return _OneRow(row, half, half_scale, expert_id)


def moe_one_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: NormWeights,
    router: torch.Tensor,
    experts: Nvfp4ExpertWeights,
    shared: SharedRows,
    tile: OneTile | None = None,
) -> torch.Tensor:
    """``moe_one_nvfp4`` as three Triton launches; ``tile`` overrides ``ONE_TILE``."""
    tile = tile or ONE_TILE
    row = norm_route_one_triton(x, residual, norm, router, experts.expert_range)
    hidden = one_gate_up_triton(row, experts, shared, x.dtype, tile)
    return one_down_triton(hidden, row.expert_id, experts, shared, x.dtype, tile)


@dataclass(frozen=True)
class _OneHidden:
    """SwiGLU rows: the routed expert's [I] as half blocks, unwritten where another rank holds it, the shared one's in
    planes, f32 [J]."""

    half: torch.Tensor
    half_scale: torch.Tensor
    shared: torch.Tensor


def one_gate_up_triton(
    row: _OneRow, experts: Nvfp4ExpertWeights, shared: SharedRows, dtype: torch.dtype, tile: OneTile
) -> _OneHidden:
    """First products of both experts and their activation, rounded to ``dtype`` where the separate ops round."""
    inter, shared_inter, device = experts.w13.shape[1] // 2, shared.down.shape[1], row.x.device
    half, half_scale = _empty_half_blocks(inter, device)
    shared_hidden = torch.empty(shared_inter, dtype=torch.float32, device=device)
    programs = ceil_div(shared_inter, tile.outputs) + inter // 8 // tile.groups
    _one_gate_up_kernel[(programs,)](
        row.x,
        row.half.view(torch.int64),
        row.half_scale,
        row.expert_id,
        experts.w13.view(torch.int64),
        experts.w13_block_scale.view(torch.int64),
        experts.w13_scale,
        shared.gate_up.view(torch.int64),
        shared.gate_up_scale,
        half,
        half_scale,
        shared_hidden,
        inter,
        shared_inter,
        DEPTH=row.x.numel(),
        OUTPUTS=tile.outputs,
        GROUPS=tile.groups,
        FIRST=min(tile.first, ceil_div(shared_inter, tile.outputs)),
        WARPS=tile.up_warps,
        DTYPE=TRITON_DTYPES[dtype],
        SHIFT=float(1 << SCALE_SHIFT),
        ASM=not interpreted(),
        num_warps=tile.up_warps,
        **overlap_options(device, 1),
    )
    return _OneHidden(half, half_scale, shared_hidden)


def one_down_triton(
    hidden: _OneHidden,
    expert_id: torch.Tensor,
    experts: Nvfp4ExpertWeights,
    shared: SharedRows,
    dtype: torch.dtype,
    tile: OneTile,
) -> torch.Tensor:
    """``[1, M]``: the second products of both experts, added."""
    size, shared_inter = shared.down.shape
    out = torch.empty((1, size), dtype=dtype, device=expert_id.device)
    _one_down_kernel[(size // 8,)](
        hidden.half.view(torch.int64),
        hidden.half_scale,
        hidden.shared,
        expert_id,
        experts.w2.view(torch.int64),
        experts.w2_block_scale.view(torch.int64),
        experts.w2_scale,
        shared.down.view(torch.int64),
        shared.down_scale,
        out,
        size,
        DEPTH=hidden.half.numel(),
        SHARED_DEPTH=shared_inter,
        WARPS=tile.down_warps,
        SHIFT=float(1 << SCALE_SHIFT),
        ASM=not interpreted(),
        num_warps=tile.down_warps,
        maxnreg=tile.down_registers,
        **overlap_options(expert_id.device, 1),
    )
    return out


def _empty_half_blocks(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for a row of ``size`` features, a multiple of a chunk."""
    assert size % CHUNK == 0
    half = torch.empty(size, dtype=torch.float16, device=device)
    return half, torch.empty(size // 16, dtype=torch.float32, device=device)
