"""NVFP4 in four-bit arithmetic (W4A4): activations to e2m1 blocks, products on FP4 tensor cores.

Called by the NVFP4 layers of ``quant`` on GPUs of the Blackwell generation; ``moe_w4a4`` runs the experts. Weights keep
the checkpoint's layout. One product kernel, dense or grouped by expert: weight rows are the tensor core's M side (it
wants 128 of them), tokens its N side. Block scales go into the product, both global scales into its epilogue.
Legend: T tokens or rows, K in features, N out features, E experts. Semantics: MODEL_SPEC 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from outrider.kernels._dispatch import arrival_counters, ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.moe_dispatch import SortedRows
from outrider.kernels.moe_gemm import find_tile, max_tiles
from outrider.kernels.nvfp4 import BLOCK_SIZE, E2M1_VALUES, quantize_nvfp4_activations, unpack_e2m1

DEPTH_MULTIPLE = 32
"""In features must be a multiple of this: packed rows then start at 16 bytes, as the copy engine wants them."""

OUTPUTS = 128
"""Weight rows of a tile: the M side of Blackwell's block-scaled product."""


@dataclass(frozen=True)
class Fp4Rows:
    """Rows as FP4 tensor cores read them: ``codes`` u8 [T, K/2], low nibble first; ``block_scale`` e4m3 [T, K/16]."""

    codes: torch.Tensor
    block_scale: torch.Tensor


@dataclass(frozen=True)
class Fp4Weight:
    """``codes`` u8 [N, K/2] or [E, N, K/2], ``block_scale`` e4m3 [..., N, K/16], both as the checkpoint has them.

    ``global_scale`` (``weight_scale_2``) and ``input_scale``, f32 of one element, multiply the product.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor

    def expert(self, i: int) -> Fp4Weight:
        """The weight of expert ``i`` alone."""
        return Fp4Weight(self.codes[i], self.block_scale[i], self.global_scale, self.input_scale)


@dataclass(frozen=True)
class Fp4Tile:
    """Launch constants of one product: rows and in features of a tile (its weight rows are 128), and how it is run."""

    rows: int
    depth: int
    stages: int
    warps: int
    split_k: int = 1


DENSE_TILES = (
    (16, Fp4Tile(16, 256, 4, 4, split_k=4)),
    (64, Fp4Tile(64, 256, 3, 4, split_k=2)),
    (1 << 30, Fp4Tile(128, 256, 3, 8)),
)
"""(most rows, tile). Chosen to fit 99 KiB of shared memory, the least that a Blackwell GPU has; not yet measured."""


def w4a4_linear(x: torch.Tensor, weight: Fp4Weight) -> torch.Tensor:
    """``x[T, K] -> [T, N]`` in ``x``'s dtype, both operands in NVFP4: about 10 % noise of ``x``."""
    if not on_gpu(x):
        return w4a4_linear_reference(x, weight)
    tile = next(tile for most_rows, tile in DENSE_TILES if x.shape[0] <= most_rows)
    return w4a4_linear_triton(x, weight, tile)


def w4a4_linear_reference(x: torch.Tensor, weight: Fp4Weight) -> torch.Tensor:
    """Plain-torch ``w4a4_linear``: every factor exact in float32, sums in float32."""
    values, block_scale = quantize_nvfp4_activations(x, weight.input_scale)
    product = F.linear(
        _scaled(values, block_scale), _scaled(unpack_e2m1(weight.codes, torch.float32), weight.block_scale)
    )
    return (product * (weight.input_scale * weight.global_scale)).to(x.dtype)


def w4a4_linear_triton(x: torch.Tensor, weight: Fp4Weight, tile: Fp4Tile) -> torch.Tensor:
    """``w4a4_linear`` as two launches: quantize, multiply."""
    out = torch.empty((x.shape[0], weight.codes.shape[0]), dtype=x.dtype, device=x.device)
    w4a4_gemm_triton(quantize_nvfp4_triton(x, weight.input_scale), x.shape[0], weight, out, tile)
    return out


def quantize_nvfp4_reference(x: torch.Tensor, input_scale: torch.Tensor) -> Fp4Rows:
    """Plain-torch ``quantize_nvfp4_triton``."""
    values, block_scale = quantize_nvfp4_activations(x, input_scale)
    table = torch.tensor(E2M1_VALUES[:8], device=x.device)
    codes = torch.bucketize(values.abs(), table) + 8 * values.signbit()
    return Fp4Rows((codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), block_scale)


def _scaled(values: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Values [..., K] times their blocks' scales, in float32 (exact: at most six significant bits)."""
    return (values.unflatten(-1, (-1, BLOCK_SIZE)) * block_scale.float()[..., None]).flatten(-2)


@triton.jit
def _quantize_nvfp4_kernel(x_ptr, input_scale_ptr, codes_ptr, scale_ptr, depth, BLOCKS: tl.constexpr):
    # A program takes BLOCKS scale blocks of one row.
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    num_blocks = depth // 16
    inside = block < num_blocks
    feature = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row * depth + feature, mask=inside[:, None], other=0.0).to(tl.float32)
    input_scale = tl.load(input_scale_ptr)
    # Magnitudes compare as integers, where NaN is the largest and so is kept.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    wanted = tl.div_rn(largest, 6.0 * input_scale)
    scale = tl.where(wanted > 448.0, 448.0, wanted).to(tl.float8e4nv)
    step = scale.to(tl.float32) * input_scale
    # A block whose scale rounds to 0 becomes zeros.
    step = tl.where(step > 0, step, float("inf"))
    size = tl.div_rn(tl.abs(x), step[:, None])
    # Bounds between neighbours 0, .5, 1, 1.5, 2, 3, 4, 6; a tie takes the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5) + (size > 5.0)
    code = tl.where(x.to(tl.int32, bitcast=True) < 0, code + 8, code)
    low, high = tl.split(tl.reshape(code, (BLOCKS, 8, 2)))
    byte = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(codes_ptr + row * (depth // 2) + byte, packed, mask=inside[:, None])
    tl.store(scale_ptr + row * num_blocks + block, scale, mask=inside)


@triton.jit
def _load_scales(ptr, rows, last_row, blocks, num_blocks, AGAIN: tl.constexpr = False):
    mask = (rows[:, None] < last_row) & (blocks[None, :] < num_blocks)
    ptrs = ptr + rows[:, None].to(tl.int64) * num_blocks + blocks[None, :]
    if AGAIN:  # Triton 3.6 gives a scale operand to one product only; this load is not merged with the first
        return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".ca")
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=("num_rows",))
def _w4a4_kernel(
    x_desc,
    w_desc,
    x_scale_ptr,
    w_scale_ptr,
    input_scale_ptr,
    global_scale_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    offsets_ptr,
    index_ptr,
    num_rows,
    num_experts,
    num_outputs,
    depth,
    GROUPED: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BINS: tl.constexpr,
):
    # num_outputs counts gate rows only when GATED; the up rows follow them.
    tiles_n = tl.cdiv(num_outputs, OUTPUTS)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if GROUPED:
        expert, row, end, tile_n = find_tile(offsets_ptr, tile, num_experts, tiles_n, ROWS, BINS)
        if expert >= num_experts:
            return
    else:
        row_blocks = tl.cdiv(num_rows, ROWS)
        expert = 0
        row = tile % row_blocks * ROWS
        end = num_rows
        tile_n = tile // row_blocks
    num_blocks = depth // 16
    steps = tl.cdiv(tl.cdiv(depth, DEPTH), SPLIT_K)
    first = split * steps * DEPTH
    last = tl.minimum(first + steps * DEPTH, depth)
    rows = row + tl.arange(0, ROWS)
    columns = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = expert * num_outputs * (2 if GATED else 1) + tile_n * OUTPUTS
    weight_rows = weight_row + tl.arange(0, OUTPUTS)
    all_weight_rows = num_experts * num_outputs * (2 if GATED else 1)
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    up = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for k in tl.range(first, last, DEPTH):
        blocks = k // 16 + tl.arange(0, DEPTH // 16)
        x = x_desc.load([row, k // 2])
        x_scale = _load_scales(x_scale_ptr, rows, end, blocks, num_blocks)
        w = w_desc.load([weight_row, k // 2])
        w_scale = _load_scales(w_scale_ptr, weight_rows, all_weight_rows, blocks, num_blocks)
        acc = tl.dot_scaled(w, w_scale, "e2m1", x.T, x_scale, "e2m1", acc)
        if GATED:
            x_scale = _load_scales(x_scale_ptr, rows, end, blocks, num_blocks, AGAIN=True)
            w = w_desc.load([weight_row + num_outputs, k // 2])
            w_scale = _load_scales(
                w_scale_ptr, weight_rows + num_outputs, all_weight_rows, blocks, num_blocks
            )
            up = tl.dot_scaled(w, w_scale, "e2m1", x.T, x_scale, "e2m1", up)
    mask = (columns[:, None] < num_outputs) & (rows[None, :] < end)
    is_last = True
    if SPLIT_K > 1:
        # The last program of a tile to arrive adds the parts in a fixed order.
        slots = rows[None, :].to(tl.int64) * num_outputs + columns[:, None]
        plane = num_outputs.to(tl.int64) * num_rows  # num_rows 1 is a constant without .to
        tl.store(partial_ptr + split * plane + slots, acc, mask=mask)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if is_last:
            acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
            for part in tl.static_range(SPLIT_K):
                acc += tl.load(partial_ptr + part * plane + slots, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
    if is_last:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        scale = tl.load(input_scale_ptr) * tl.load(global_scale_ptr)
        acc = acc * scale
        if GATED:
            gate = acc.to(dtype).to(tl.float32)
            acc = gate * tl.sigmoid(gate) * (up * scale).to(dtype).to(tl.float32)
        places = tl.load(index_ptr + rows, mask=rows < end, other=0) if GROUPED and not GATED else rows
        out_ptrs = out_ptr + places[None, :].to(tl.int64) * num_outputs + columns[:, None]
        tl.store(out_ptrs, acc.to(dtype), mask=mask)


def quantize_nvfp4_triton(x: torch.Tensor, input_scale: torch.Tensor) -> Fp4Rows:
    """``x[T, K]`` to NVFP4: per 16 inputs the scale ``sf = e4m3(amax / (6 · input_scale))``, then ``e2m1(x / step)``.

    ``step = sf · input_scale``. Ties go to the even code, values beyond 6 and scales beyond 448 saturate; a block
    with a NaN gets the scale NaN.
    """
    x = x.contiguous()
    num_rows, depth = x.shape
    codes = torch.empty((num_rows, depth // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((num_rows, depth // BLOCK_SIZE), dtype=torch.float8_e4m3fn, device=x.device)
    blocks = min(128, power_of_two_at_least(depth // BLOCK_SIZE, 8))
    grid = (num_rows, ceil_div(depth // BLOCK_SIZE, blocks))
    _quantize_nvfp4_kernel[grid](x, input_scale, codes, scale, depth, BLOCKS=blocks, num_warps=4)
    return Fp4Rows(codes, scale)


def w4a4_gemm_triton(
    x: Fp4Rows,
    num_rows: int,
    weight: Fp4Weight,
    out: torch.Tensor,
    tile: Fp4Tile,
    groups: SortedRows | None = None,
    gated: bool = False,
) -> None:
    """Write ``x · Wᵀ``, all scales applied, to ``out``; ``groups`` says which rows of ``x`` belong to which expert.

    ``gated``: N is gate rows then up rows, and ``silu(gate) · up`` is written in grouped order; else a grouped row r
    goes to ``out[index[r]]``.
    """
    num_experts = weight.codes.shape[0] if groups else 1
    num_outputs, depth = weight.codes.shape[-2] // (2 if gated else 1), weight.codes.shape[-1] * 2
    blocks = max_tiles(num_rows, num_experts, tile.rows) if groups else ceil_div(num_rows, tile.rows)
    tiles = blocks * ceil_div(num_outputs, OUTPUTS)
    partial, arrivals = None, None
    if tile.split_k > 1:
        partial = torch.empty((tile.split_k, num_rows, num_outputs), dtype=torch.float32, device=out.device)
        arrivals = arrival_counters(out.device)
    _w4a4_kernel[(tiles, tile.split_k)](
        TensorDescriptor.from_tensor(x.codes, [tile.rows, tile.depth // 2]),
        TensorDescriptor.from_tensor(weight.codes.view(-1, depth // 2), [OUTPUTS, tile.depth // 2]),
        x.block_scale,
        weight.block_scale,
        weight.input_scale,
        weight.global_scale,
        out,
        partial,
        arrivals,
        groups.offsets if groups else None,
        groups.index if groups else None,
        num_rows,
        num_experts,
        num_outputs,
        depth,
        GROUPED=groups is not None,
        GATED=gated,
        SPLIT_K=tile.split_k,
        ROWS=tile.rows,
        OUTPUTS=OUTPUTS,
        DEPTH=tile.depth,
        BINS=power_of_two_at_least(num_experts, 16),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def aot_spec(tile: Fp4Tile, grouped: bool = False, gated: bool = False):
    """A (kernel, signature, constants, options, aligned arguments) entry for compiling without a GPU."""
    tensors = {
        "x_desc": f"tensordesc<u8[{tile.rows}, {tile.depth // 2}]>",
        "w_desc": f"tensordesc<u8[{OUTPUTS}, {tile.depth // 2}]>",
        "x_scale_ptr": "*fp8e4nv",
        "w_scale_ptr": "*fp8e4nv",
        "input_scale_ptr": "*fp32",
        "global_scale_ptr": "*fp32",
        "out_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "arrivals_ptr": "*i32",
        "offsets_ptr": "*i32",
        "index_ptr": "*i32",
    }
    numbers = dict.fromkeys(("num_rows", "num_experts", "num_outputs", "depth"), "i32")
    constants = {
        "GROUPED": grouped,
        "GATED": gated,
        "SPLIT_K": tile.split_k,
        "ROWS": tile.rows,
        "OUTPUTS": OUTPUTS,
        "DEPTH": tile.depth,
        "BINS": 16,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return _w4a4_kernel, tensors | numbers, constants, options, ("x_scale_ptr", "w_scale_ptr", "depth")


AOT_SPECS = [
    (
        _quantize_nvfp4_kernel,
        {
            "x_ptr": "*bf16",
            "input_scale_ptr": "*fp32",
            "codes_ptr": "*u8",
            "scale_ptr": "*fp8e4nv",
            "depth": "i32",
        },
        {"BLOCKS": 128},
    ),
]

BLACKWELL_AOT_SPECS = [aot_spec(tile) for _, tile in (DENSE_TILES[0], DENSE_TILES[-1])]
