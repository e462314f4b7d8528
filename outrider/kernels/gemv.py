"""One row times FP8 weights without tensor cores: every weight of a program is on its way before its input is there.

Called by ``gemm`` and ``moe_few`` for steps of one token, where a product lasts ten microseconds and tiles, splits and
their sums cost a third of it. A program takes a few weight rows whole: it loads them into registers, waits for its
input, multiplies in float32, adds up in a fixed order. The floor is one read of the weights.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div
from outrider.kernels.overlap import overlap_options, wait_for_inputs

MAX_BYTES_A_THREAD = 384
"""Weights that a thread can hold and still multiply without spilling: 96 registers."""


@dataclass(frozen=True)
class GemvTile:
    """Launch constants: weight rows of a program, columns of a tile (a multiple of 16), warps."""

    outputs: int
    step: int
    warps: int

    def takes(self, depth: int, pairs: bool = False) -> bool:
        """Whether rows of ``depth`` bytes, or pairs of them, fit a program's registers and are aligned."""
        num_bytes = self.outputs * (1 + pairs) * depth
        return depth % 16 == 0 and num_bytes <= MAX_BYTES_A_THREAD * 32 * self.warps


@triton.jit
def _load_tiles(w_ptr, rows, inside, DEPTH: tl.constexpr, STEP: tl.constexpr):
    """The weight rows ``rows`` as tiles ``[len(rows), STEP]``; zeros where they are not ``inside``."""
    starts = w_ptr + rows.to(tl.int64)[:, None] * DEPTH
    tiles = ()
    for start in tl.static_range(0, DEPTH, STEP):
        part = start + tl.arange(0, STEP)
        mask = inside[:, None]
        if DEPTH % STEP:
            mask = mask & (part < DEPTH)[None, :]
        tiles = tiles + (
            tl.load(starts + part[None, :], mask=mask, other=0.0, eviction_policy="evict_first"),
        )
    return tiles


@triton.jit
def _load_rows(w_ptr, first, end, DEPTH: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):
    """``OUTPUTS`` rows from ``first`` on as tiles ``[OUTPUTS, STEP]``; zeros from row ``end`` on."""
    rows = first + tl.arange(0, OUTPUTS)
    return _load_tiles(w_ptr, rows, rows < end, DEPTH, STEP)


@triton.jit
def _multiply(tiles, x_ptr, DEPTH: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr):
    """``[OUTPUTS]``: the sums over the tiles' columns times ``x[DEPTH]``."""
    acc = tl.zeros((OUTPUTS, STEP // 16), tl.float32)
    for i in tl.static_range(len(tiles)):
        part = i * STEP + tl.arange(0, STEP)
        x = tl.load(x_ptr + part, mask=part < DEPTH, other=0.0).to(tl.float32)
        product = tiles[i].to(tl.float32) * x[None, :]
        # The 16 bytes of a load are one thread's: adding them up first needs no other thread.
        acc += tl.sum(tl.reshape(product, (OUTPUTS, STEP // 16, 16)), 2)
    return tl.sum(acc, 1)


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    num_outputs,
    HAS_X_SCALE: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    first = tl.program_id(0) * OUTPUTS
    tiles = _load_rows(w_ptr, first, num_outputs, DEPTH, OUTPUTS, STEP)
    outputs = first + tl.arange(0, OUTPUTS)
    inside = outputs < num_outputs
    scale = tl.load(w_scale_ptr + outputs, mask=inside, other=0.0)
    wait_for_inputs(OVERLAP)
    if HAS_X_SCALE:
        scale *= tl.load(x_scale_ptr)
    total = _multiply(tiles, x_ptr, DEPTH, OUTPUTS, STEP) * scale
    tl.store(out_ptr + outputs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _down_one_kernel(
    x_ptr,
    shared_x_ptr,
    w_ptr,
    shared_ptr,
    out_ptr,
    id_ptr,
    x_scale_ptr,
    w_scale_ptr,
    shared_x_scale_ptr,
    shared_w_scale_ptr,
    size,
    DEPTH: tl.constexpr,
    SHARED_DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The second products of the shared and of the chosen expert for one token, added as the model adds them."""
    first = tl.program_id(0) * OUTPUTS
    shared_tiles = _load_rows(shared_ptr, first, size, SHARED_DEPTH, OUTPUTS, STEP)
    outputs = first + tl.arange(0, OUTPUTS)
    inside = outputs < size
    shared_scale = tl.load(shared_w_scale_ptr + outputs, mask=inside, other=0.0) * tl.load(shared_x_scale_ptr)
    wait_for_inputs(OVERLAP)
    expert = tl.load(id_ptr)  # -1: another rank's
    here = tl.where(expert >= 0, size, 0)
    expert = tl.maximum(expert, 0)
    tiles = _load_rows(w_ptr + expert.to(tl.int64) * size * DEPTH, first, here, DEPTH, OUTPUTS, STEP)
    scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr + expert)
    shared = _multiply(shared_tiles, shared_x_ptr, SHARED_DEPTH, OUTPUTS, STEP) * shared_scale
    own = tl.where(here > 0, _multiply(tiles, x_ptr, DEPTH, OUTPUTS, STEP) * scale, 0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    total = own.to(dtype).to(tl.float32) + shared.to(dtype).to(tl.float32)
    tl.store(out_ptr + outputs, total.to(dtype), mask=inside)


def gemv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    tile: GemvTile,
) -> torch.Tensor:
    """``gemm.fp8_linear`` of one row: ``x`` [1, K] in any dtype, ``weight`` e4m3 [N, K]; K as ``tile.takes`` it."""
    num_outputs, depth = weight.shape
    out = torch.empty((1, num_outputs), dtype=out_dtype, device=x.device)
    _gemv_kernel[(ceil_div(num_outputs, tile.outputs),)](
        x,
        weight,
        x_scale,
        w_scale,
        out,
        num_outputs,
        HAS_X_SCALE=x_scale is not None,
        DEPTH=depth,
        OUTPUTS=tile.outputs,
        STEP=tile.step,
        num_warps=tile.warps,
        **overlap_options(x.device, 1),
    )
    return out


def down_one_triton(
    hidden: torch.Tensor,
    shared_hidden: torch.Tensor,
    expert_id: torch.Tensor,
    w2: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    shared: torch.Tensor,
    shared_x_scale: torch.Tensor,
    shared_w_scale: torch.Tensor,
    out_dtype: torch.dtype,
    tile: GemvTile,
) -> torch.Tensor:
    """``[1, M]``: ``hidden`` e4m3 [I] times ``w2[expert]`` e4m3 [E, M, I], plus the shared expert's ``[M, J]`` part.

    ``expert_id`` int32 of one element, -1 for an expert that another rank holds; ``w_scale`` f32 [E].
    """
    _, size, depth = w2.shape
    out = torch.empty((1, size), dtype=out_dtype, device=hidden.device)
    _down_one_kernel[(ceil_div(size, tile.outputs),)](
        hidden,
        shared_hidden,
        w2,
        shared,
        out,
        expert_id,
        x_scale,
        w_scale,
        shared_x_scale,
        shared_w_scale,
        size,
        DEPTH=depth,
        SHARED_DEPTH=shared.shape[1],
        OUTPUTS=tile.outputs,
        STEP=tile.step,
        num_warps=tile.warps,
        **overlap_options(hidden.device, 1),
    )
    return out


_GEMV = {
    "x_ptr": "*fp8e4nv",
    "w_ptr": "*fp8e4nv",
    "x_scale_ptr": "*fp32",
    "w_scale_ptr": "*fp32",
    "out_ptr": "*bf16",
    "num_outputs": "i32",
}
_DOWN = {
    **_GEMV,
    "shared_x_ptr": "*fp8e4nv",
    "shared_ptr": "*fp8e4nv",
    "id_ptr": "*i32",
    "shared_x_scale_ptr": "*fp32",
    "shared_w_scale_ptr": "*fp32",
    "size": "i32",
}
_ALIGNED = ("x_ptr", "w_ptr", "w_scale_ptr", "out_ptr")
AOT_SPECS = [
    (
        _gemv_kernel,
        _GEMV,
        {"HAS_X_SCALE": False, "DEPTH": 5120, "OUTPUTS": 8, "STEP": 512, "OVERLAP": True},
        {"num_warps": 4},
        (*_ALIGNED, "num_outputs"),
    ),
    (
        _gemv_kernel,
        _GEMV | {"x_ptr": "*bf16"},
        {"HAS_X_SCALE": False, "DEPTH": 5120, "OUTPUTS": 2, "STEP": 1024, "OVERLAP": True},
        {"num_warps": 2},
        (*_ALIGNED, "num_outputs"),
    ),
    (
        _down_one_kernel,
        _DOWN,
        {"DEPTH": 8192, "SHARED_DEPTH": 8192, "OUTPUTS": 2, "STEP": 1024, "OVERLAP": True},
        {"num_warps": 4},
        (*_ALIGNED, "shared_ptr", "shared_x_ptr", "size"),
    ),
]
