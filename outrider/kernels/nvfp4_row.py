"""One row times repacked NVFP4 weights without tensor cores: what the kernels of ``moe_one_nvfp4`` are made of.

Weights lie as ``nvfp4_repack`` orders them and stay exact: codes become float16 by byte permutes, two multiply-adds at
a time sum a block of 16, and the block's sum meets its scale in float32. The row is kept as *half blocks* for that:
float16 values with a float32 power of two a block, 16 to 32 at the largest, so that no sum of a block overflows; a
bfloat16 row loses nothing. Half blocks stand in the order in which the lanes of a warp want them.
"""

# Triton 3.6 compiles tuples of tiles that grow by +, not by *; mypy cannot type either.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import triton
import triton.language as tl

from outrider.kernels.nvfp4_decode import sign_place

SCALE_SHIFT = 12
"""Powers of two by which the sums of ``add_expert_chunk`` are too small: scales keep a lower exponent."""


@triton.jit
def half_place(k):
    """Where in feature ``k`` stands in a row of half blocks: chunk | h cp piece q e | four features."""
    return k // 256 * 256 + k // 32 % 2 * 128 + k // 4 % 4 * 32 + k // 64 % 4 * 8 + k // 16 % 2 * 4 + k % 4


@triton.jit
def half_scale_place(block):
    """Where the scale of block ``block`` of a row stands: chunk | h cp q e."""
    return block // 16 * 16 + block // 2 % 2 * 8 + block // 4 % 4 * 2 + block % 2


@triton.jit
def half_block_scale(largest):
    """The power of two that takes ``largest`` f32, at least 2**-100, to 16 to 32."""
    power = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return (power - (4 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def store_half_blocks(out_ptr, scale_ptr, first, values, size, SIZE: tl.constexpr):
    """Write ``values`` f32 [SIZE], in features ``first`` on of a row of ``size``, as half blocks."""
    BLOCKS: tl.constexpr = SIZE // 16
    blocks = tl.reshape(values, (BLOCKS, 16))
    scale = half_block_scale(tl.maximum(tl.max(tl.abs(blocks), 1), 2.0**-100))
    block = first // 16 + tl.arange(0, BLOCKS)
    inside = block < size // 16
    k = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + half_place(k), (blocks / scale[:, None]).to(tl.float16), mask=inside[:, None])
    tl.store(scale_ptr + half_scale_place(block), scale, mask=inside)


def _dots_asm(rows: int) -> str:
    """PTX for a block of one or two weight rows: its sums, from their words and the four registers of a half block.

    The high byte of a float16 says all of an e2m1 value, so one byte permute looks up four magnitudes and two more
    spread them. Signs wait in bits 7, 15, 23, 31 for the low four values of a word and 3, 11, 19, 27 for the high.
    """
    lines = ["{ .reg .b32 x<8>, a, b, t, v, p, s; .reg .b16 l, h; .reg .f32 f, g;"]
    lines += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${2 * rows + i};" for i in range(4)]
    for row in range(rows):
        lines += [f"mov.b64 {{a, b}}, ${rows + row};"]
        for i, word in enumerate("ab"):
            for half in range(2):
                lines += [f"and.b32 t, {word}, 0x77777777;"] if half == 0 else ["shr.u32 t, t, 16;"]
                lines += [f"shl.b32 {word}, {word}, 4;"] if half else []
                lines += [
                    "prmt.b32 v, 0x3E3C3800, 0x46444240, t;",
                    f"lop3.b32 v, v, {word}, 0x80808080, 0xF8;",
                ]
                for pair, spread in enumerate(("0x1404", "0x3424")):
                    x = f"x{4 * i + 2 * half + pair}"
                    is_first = i == half == pair == 0
                    sum_up = f"mul.rn.f16x2 s, p, {x};" if is_first else f"fma.rn.f16x2 s, p, {x}, s;"
                    lines += [f"prmt.b32 p, v, 0, {spread};", sum_up]
        lines += ["mov.b32 {l, h}, s; cvt.f32.f16 f, l; cvt.f32.f16 g, h;", f"add.rn.f32 ${row}, f, g;"]
    return "\n".join(lines) + "}"


_DOT_ASM, _DOT_CONSTRAINTS = tl.constexpr(_dots_asm(1)), tl.constexpr("=&f,l,l,l,l,l")
_DOTS_ASM, _DOTS_CONSTRAINTS = tl.constexpr(_dots_asm(2)), tl.constexpr("=&f,=&f,l,l,l,l,l,l")


@triton.jit
def _dot_plainly(word, x0, x1, x2, x3):
    """A block's sum as the assembly makes it, in float32: the interpreter's path, and the statement of what it does."""
    total = tl.zeros(word.shape, tl.float32)
    for i in tl.static_range(16):
        code = ((word >> (4 * i)) & 7).to(tl.int32)
        sign = (word >> sign_place(i)) & 1
        exponent = code >> 1
        fraction = (code & 1).to(tl.float32) * 0.5
        value = tl.where(exponent == 0, fraction, (1.0 + fraction) * tl.exp2(exponent.to(tl.float32) - 1.0))
        if i // 4 == 0:
            four = x0
        elif i // 4 == 1:
            four = x1
        elif i // 4 == 2:
            four = x2
        else:
            four = x3
        x = (four >> (16 * (i % 4))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.where(sign != 0, -value, value) * x
    return total


@triton.jit
def _load_words(ptr, word, here):
    """Eight words of each lane, ``[2, 2, 2 · L]``: h, cp, and lane and e; whatever where ``here`` is false."""
    ptrs = ptr[None, None, :] + word
    return tl.load(ptrs, mask=here[None, None, :], eviction_policy="evict_first")


@triton.jit
def load_expert_chunk(
    w_ptr, s_ptr, first_group, step, limit, which,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Chunk ``step · WARPS / GROUPS`` and its neighbours for ``add_expert_chunk``, one a warp: (words, their scales).

    ``w_ptr`` i64 and ``s_ptr`` i64 (eight scales) of one matrix. ``which`` None: the words of rows 0 to 7 and of rows 8
    to 15 of each group; else of one half alone, 0 or 1. Chunks from ``limit`` on are not read.
    """
    PARTS: tl.constexpr = WARPS // GROUPS
    # Lane and e are one dimension, along which words lie side by side: the compiler then gives each thread its lane's.
    place = tl.arange(0, 64 * WARPS)
    lanes = tl.arange(0, 32 * WARPS)
    two = tl.arange(0, 2)
    word = two[:, None, None] * 1024 + two[None, :, None] * 256
    chunk = step * PARTS + place // 64 // GROUPS
    group = first_group + place // 64 % GROUPS
    w_ptr += ((group // 4).to(tl.int64) * CHUNKS + chunk) * 2048 + group % 4 * 64 + place % 64
    lane_chunk = step * PARTS + lanes // 32 // GROUPS
    lane_group = first_group + lanes // 32 % GROUPS
    s_ptr += (
        ((lane_group // 4).to(tl.int64) * CHUNKS + lane_chunk) * 256 + lane_group % 4 * 64 + lanes % 32 * 2
    )
    inside = chunk < limit
    lane_inside = (lane_chunk < limit)[:, None]
    scales = tl.load(s_ptr[:, None] + two[None, :], mask=lane_inside)
    if which is None:
        words = (_load_words(w_ptr, word, inside), _load_words(w_ptr + 512, word, inside))
    else:
        words = (_load_words(w_ptr + 512 * which, word, inside),)
    return words, scales


@triton.jit
def add_expert_chunk(
    sums, words, scales, x_ptr, x_scale_ptr, step, which,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``sums``, one f32 ``[2, 2, 2 · L]`` for each of ``words``, plus what a chunk gives with a row of half blocks.

    ``x_ptr`` i64 (four values) and ``x_scale_ptr`` f32. What was not read meets zeros: every code and scale is finite.
    """
    PARTS: tl.constexpr = WARPS // GROUPS
    place = tl.arange(0, 64 * WARPS)
    two = tl.arange(0, 2)
    h, cp = two[:, None, None], two[None, :, None]
    chunk = step * PARTS + place // 64 // GROUPS
    pieces = (x_ptr + chunk * 128 + place % 8)[None, None, :] + (h * 64 + cp * 32)
    blocks = (x_scale_ptr + chunk * 32 + tl.max_contiguous(place % 8, 2))[None, None, :] + (h * 16 + cp * 8)
    if CHUNKS % PARTS:
        inside = (chunk < CHUNKS)[None, None, :]
        x = (tl.load(pieces, mask=inside, other=0), tl.load(pieces + 8, mask=inside, other=0))
        x = x + (tl.load(pieces + 16, mask=inside, other=0), tl.load(pieces + 24, mask=inside, other=0))
        x_scale = tl.load(blocks, mask=inside, other=0.0)
    else:
        x = (tl.load(pieces), tl.load(pieces + 8), tl.load(pieces + 16), tl.load(pieces + 24))
        x_scale = tl.load(blocks)
    if which is None:
        low, high = _two_dots(words[0], words[1], x[0], x[1], x[2], x[3], ASM)
        low = sums[0] + low * (_block_scales(scales.to(tl.int32), WARPS) * x_scale)
        return low, sums[1] + high * (_block_scales((scales >> 32).to(tl.int32), WARPS) * x_scale)
    else:
        dots = _one_dot(words[0], x[0], x[1], x[2], x[3], ASM)
        return (sums[0] + dots * (_block_scales((scales >> (32 * which)).to(tl.int32), WARPS) * x_scale),)


@triton.jit
def _block_scales(four, WARPS: tl.constexpr):
    """``scale * 2**-SCALE_SHIFT`` in f32 ``[2, 2, 2 · L]`` of repacked scale bytes i32 ``[L, 2]``: cp, e of each h."""
    four = tl.reshape(tl.permute(four, (1, 0)), (2, 1, 32 * WARPS, 1))
    four = tl.reshape(tl.broadcast_to(four, (2, 1, 32 * WARPS, 2)), (2, 1, 64 * WARPS))
    shift = tl.arange(0, 2)[None, :, None] * 16 + (tl.arange(0, 64 * WARPS) % 2 * 8)[None, None, :]
    return ((((four >> shift) & 127) << 20) | 0x38000000).to(tl.float32, bitcast=True)


@triton.jit
def _one_dot(word, x0, x1, x2, x3, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            _DOT_ASM, _DOT_CONSTRAINTS, [word, x0, x1, x2, x3], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return _dot_plainly(word, x0, x1, x2, x3)


@triton.jit
def _two_dots(word, other, x0, x1, x2, x3, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            _DOTS_ASM,
            _DOTS_CONSTRAINTS,
            [word, other, x0, x1, x2, x3],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return _dot_plainly(word, x0, x1, x2, x3), _dot_plainly(other, x0, x1, x2, x3)


@triton.jit
def sum_expert_rows(sums, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """f32 [8 · GROUPS]: eight rows of each group, from one of ``add_expert_chunk``'s sums."""
    lanes = tl.sum(tl.sum(sums, 1), 0)
    rows = tl.sum(tl.reshape(lanes, (WARPS // GROUPS, 8 * GROUPS, 8)), 2)
    return tl.sum(rows, 0)
