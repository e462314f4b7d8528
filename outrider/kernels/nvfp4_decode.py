"""e2m1 blocks to tensor-core operands in registers: the arithmetic under every NVFP4 kernel.

Imported by ``nvfp4_gemm``. A 64-bit word is one scale block of 16 codes; a tile of words [N, B] becomes 16
*planes* [N, B], plane p holding element p of every block, so one scale tile serves all planes and no value moves
between threads. The activations are stored plane by plane to match (``to_planes``).
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16_SHIFT = 8
"""Powers of two by which bf16 planes are too small: e2m1 bits read as bf16 are 2**-126 too small, and a
bf16 scale can take back at most 2**118. The epilogue restores the rest."""

FP8_SHIFT = 3
"""Powers of two by which e4m3 planes are too small: 6 x 448 / 2**3 still fits under 448."""


def _bf16_asm() -> str:
    """PTX for two blocks: 64-bit words $16, $17 and the scales (bf16x2) $18 -> 16 bf16x2 planes $0..$15."""
    lines = [
        "{ .reg .b32 a0, a1, b0, b1, c, s, t;",
        "mov.b64 {a0, a1}, $16; mov.b64 {b0, b1}, $17;",
    ]
    plane = 0
    for half in ("0", "1"):
        for select in ("0x5410", "0x7632"):  # the low, then the high 16 bits of both blocks: four codes each
            lines.append(f"prmt.b32 c, a{half}, b{half}, {select};")
            for nibble in range(4):
                sign, magnitude = 12 - 4 * nibble, 6 - 4 * nibble
                lines.append(f"shl.b32 s, c, {sign};" if sign else "mov.b32 s, c;")
                if magnitude > 0:
                    lines.append(f"shl.b32 t, c, {magnitude};")
                else:
                    lines.append(f"shr.u32 t, c, {-magnitude};")
                lines.append("and.b32 s, s, 0x80008000;")
                lines.append("lop3.b32 s, s, t, 0x01C001C0, 0xF8;")
                lines.append(f"mul.rn.bf16x2 ${plane}, s, $18;")
                plane += 1
    return "\n".join(lines) + "}"


def _fp8_asm() -> str:
    """PTX for four blocks: words $16..$19 and their e4m3 scales (4 bytes) $20 -> 16 planes of 4 bytes $0..$15.

    Per block the eight magnitudes times the scale make a table of eight e4m3 bytes in two registers, and one
    byte permute looks up four codes; then four blocks' results are transposed into planes.
    """
    lines = ["{ .reg .b16 q, p; .reg .b32 s, lo, hi, w, t, m, x, y, u, v;"]
    lines.append(".reg .b32 w0_<4>, w1_<4>, v0_<4>, v1_<4>, v2_<4>, v3_<4>;")
    for block in range(4):
        lines.append(f"mov.b64 {{w0_{block}, w1_{block}}}, ${16 + block};")
        lines.append(f"prmt.b32 s, $20, 0, {hex(0x11 * block)};")
        lines.append("{ .reg .b16 e, z; mov.b32 {e, z}, s; cvt.rn.f16x2.e4m3x2 s, e; }")
        # {0, 1/2}, {1, 3/2}, {2, 3}, {4, 6} as f16x2, each divided by 2**3
        for table, first, second in (("lo", 0x2C000000, 0x32003000), ("hi", 0x36003400, 0x3A003800)):
            for factor, pair in ((first, "q"), (second, "p")):
                lines.append(f"mov.b32 y, {hex(factor)}; mul.rn.f16x2 x, s, y;")
                lines.append(f"cvt.rn.satfinite.e4m3x2.f16x2 {pair}, x;")
            lines.append(f"mov.b32 {table}, {{q, p}};")
        for word in range(2):
            lines.append(f"and.b32 t, w{word}_{block}, 0x77777777;")
            lines.append(f"prmt.b32 v{2 * word}_{block}, lo, hi, t;")
            lines.append(f"shr.u32 t, t, 16; prmt.b32 v{2 * word + 1}_{block}, lo, hi, t;")
            lines.append(f"shl.b32 t, w{word}_{block}, 4;")
            for part, signs in ((0, "0x9D8C"), (1, "0xBFAE")):  # a set top bit replicates the byte's sign
                value = f"v{2 * word + part}_{block}"
                lines.append(f"prmt.b32 m, w{word}_{block}, t, {signs};")
                lines.append(f"lop3.b32 {value}, {value}, m, 0x80808080, 0xF8;")
    for group in range(4):
        v = f"v{group}_"
        lines.append(f"prmt.b32 x, {v}0, {v}1, 0x5140; prmt.b32 y, {v}2, {v}3, 0x5140;")
        lines.append(f"prmt.b32 u, {v}0, {v}1, 0x7362; prmt.b32 v, {v}2, {v}3, 0x7362;")
        lines.append(f"prmt.b32 ${4 * group}, x, y, 0x5410; prmt.b32 ${4 * group + 1}, x, y, 0x7632;")
        lines.append(f"prmt.b32 ${4 * group + 2}, u, v, 0x5410; prmt.b32 ${4 * group + 3}, u, v, 0x7632;")
    return "\n".join(lines) + "}"


BF16_ASM = tl.constexpr(_bf16_asm())
BF16_CONSTRAINTS = tl.constexpr("=r," * 16 + "l,l,r")
FP8_ASM = tl.constexpr(_fp8_asm())
FP8_CONSTRAINTS = tl.constexpr("=r," * 16 + "l,l,l,l,r")


@triton.jit
def decode_bf16(words, scales):
    """16 bf16 planes of int64 ``words`` times e4m3 ``scales``, exact up to the factor 2**-BF16_SHIFT."""
    scales = (scales.to(tl.float32) * 3.3230699894622897e35).to(tl.bfloat16)  # 2**118
    return tl.inline_asm_elementwise(
        BF16_ASM,
        BF16_CONSTRAINTS,
        [words, scales],
        dtype=(
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
            tl.bfloat16,
        ),
        is_pure=True,
        pack=2,
    )


@triton.jit
def decode_fp8(words, scales):
    """16 e4m3 planes of int64 ``words`` times e4m3 ``scales`` · 2**-FP8_SHIFT, rounded to nearest even."""
    return tl.inline_asm_elementwise(
        FP8_ASM,
        FP8_CONSTRAINTS,
        [words, scales.to(tl.uint8, bitcast=True)],
        dtype=(
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
            tl.float8e4nv,
        ),
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode_plane_plainly(words, scales, PLANE: tl.constexpr, SHIFT: tl.constexpr):
    """One plane in float32 without inline assembly: the interpreter's path, and the statement of what both do."""
    code = ((words >> (4 * PLANE)) & 15).to(tl.int32)
    exponent = (code >> 1) & 3
    fraction = (code & 1).to(tl.float32) * 0.5
    magnitude = tl.where(exponent == 0, fraction, (1.0 + fraction) * tl.exp2(exponent.to(tl.float32) - 1.0))
    signed = tl.where(code >= 8, -magnitude, magnitude)
    return signed * scales.to(tl.float32) * (1.0 / (1 << SHIFT))


@triton.jit
def stream_source(place):
    """The in feature at place ``place`` of a row of activations in the order of ``nvfp4_repack``'s weights."""
    piece = place % 512 // 32
    column = place % 32
    return place // 512 * 512 + (column // 4 * 4 + piece // 4) * 16 + piece % 4 * 4 + column % 4
