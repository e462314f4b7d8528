"""One row times FP8 weights, from registers to the sum: the shared expert's part of ``moe_one_nvfp4``'s kernels.

A lane takes 16 bytes of a weight row, so a warp takes a chunk of 512 features. The row is float32 in *planes*: the
order in which a warp's loads of it are contiguous. Everything is float32 behind the e4m3 codes. ``gemv`` multiplies
rows that other kernels wrote, in their own order.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_place(k):
    """Where in feature ``k`` stands in a row of planes: chunk | k % 8 | lane, half of its 16 features."""
    return k // 512 * 512 + k % 8 * 64 + k // 16 % 32 * 2 + k // 8 % 2


@triton.jit
def load_fp8_tile(w_ptr, rows, inside, step, DEPTH: tl.constexpr, WARPS: tl.constexpr):
    """Step ``step`` of the weight rows ``rows`` [R], i64 ``[R, 64 · WARPS]``: eight codes a word, a chunk a warp.

    Zeros behind the last column.
    """
    columns = step * 64 * WARPS + tl.arange(0, 64 * WARPS)
    ptrs = w_ptr + rows.to(tl.int64)[:, None] * (DEPTH // 8) + columns[None, :]
    mask = inside[:, None] & (columns < DEPTH // 8)[None, :]
    return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def add_fp8_tile(acc, tile, x_ptr, step, DEPTH: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """``acc`` f32, of the tile's shape, plus what each word of ``load_fp8_tile`` gives with the planes at ``x_ptr``."""
    columns = step * 64 * WARPS + tl.arange(0, 64 * WARPS)
    ptrs = (x_ptr + columns // 64 * 512 + columns % 64)[None, :]
    mask = (columns < DEPTH // 8)[None, :]
    x = ()
    for i in tl.static_range(8):
        x = x + (tl.load(ptrs + i * 64, mask=mask, other=0.0),)
    if ASM:
        return tl.inline_asm_elementwise(
            _ADD_EIGHT_ASM,
            _ADD_EIGHT_CONSTRAINTS,
            [
                tile,
                tl.broadcast_to(x[0], tile.shape),
                tl.broadcast_to(x[1], tile.shape),
                tl.broadcast_to(x[2], tile.shape),
                tl.broadcast_to(x[3], tile.shape),
                tl.broadcast_to(x[4], tile.shape),
                tl.broadcast_to(x[5], tile.shape),
                tl.broadcast_to(x[6], tile.shape),
                tl.broadcast_to(x[7], tile.shape),
                acc,
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        for i in tl.static_range(8):
            code = ((tile >> (8 * i)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            acc += code.to(tl.float32) * x[i]
        return acc


@triton.jit
def sum_fp8_rows(acc):
    """``[R]``: the sums of the rows of ``add_fp8_tile``."""
    return tl.sum(acc, 1)


def _add_eight_asm() -> str:
    """PTX: $0 = $10 + the eight e4m3 codes of $1 times $2..$9."""
    lines = ["{ .reg .b32 w<2>, p; .reg .b16 c<4>, l, h; .reg .f32 f, s;"]
    lines += ["mov.b64 {w0, w1}, $1; mov.b32 {c0, c1}, w0; mov.b32 {c2, c3}, w1; mov.f32 s, $10;"]
    for i in range(4):
        lines += [f"cvt.rn.f16x2.e4m3x2 p, c{i}; mov.b32 {{l, h}}, p;"]
        lines += [f"cvt.f32.f16 f, l; fma.rn.f32 s, f, ${2 + 2 * i}, s;"]
        lines += [f"cvt.f32.f16 f, h; fma.rn.f32 s, f, ${3 + 2 * i}, s;"]
    return "\n".join([*lines, "mov.f32 $0, s; }"])


_ADD_EIGHT_ASM = tl.constexpr(_add_eight_asm())
_ADD_EIGHT_CONSTRAINTS = tl.constexpr("=f,l,f,f,f,f,f,f,f,f,f")
