"""NVFP4 weights decoded to memory: e2m1 blocks times their scales, as bf16 or as e4m3.

Called by ``nvfp4`` and ``moe``: at load, and before the product of shapes that no kernel reads in four bits. Kernels on
the hot path decode in registers (``nvfp4_stream``) or multiply four bits (``w4a4``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div

FP8_SHIFT = 3
"""Powers of two by which e4m3 weights are too small: 6 x 448 / 2**3 still fits under 448."""

DECODE_TILE = 256, 4
"""Blocks of a program and its warps. Not tuned, not timed: it runs at load, and for shapes that nothing else takes."""


@triton.jit
def decode_e2m1(code):
    """The values of 4-bit ``code`` (int32, bit 3 the sign) in float32."""
    exponent = (code >> 1) & 3
    fraction = (code & 1).to(tl.float32) * 0.5
    magnitude = tl.where(exponent == 0, fraction, (1.0 + fraction) * tl.exp2(exponent.to(tl.float32) - 1.0))
    return tl.where(code >= 8, -magnitude, magnitude)


def block_ptx(scale: str, byte: int, words: tuple[str, str], out: tuple[str, ...]) -> str:
    """PTX that turns a repacked block, 16 codes in two registers, into four registers of 4 e4m3 values.

    Byte ``byte`` of register ``scale`` is a scale byte of ``nvfp4_repack``: the e4m3 code c of half the scale, with
    bit 7 saying whether 1.5 x the scale rounds up. The magnitudes' codes are 0, c, c+8, c+12+up, c+16, c+20+up, c+24,
    c+28+up: a table of eight bytes, from which one byte permute looks up four values. Adding 0x80 to the byte below an
    odd entry carries ``up`` into it; what that leaves in bits 7 is where signs go. Signs wait in bits 7, 15, 23, 31
    for the low four values of a word and in 3, 11, 19, 27 for the high four.
    """
    lines = [
        "{ .reg .b32 s, lo, hi, t, v, u;",
        f"prmt.b32 s, {scale}, 0, {hex(0x4440 + byte)};",
        "mad.lo.u32 lo, s, 0x01010100, 0x0C880000; mad.lo.u32 hi, s, 0x01010101, 0x1C981490;",
    ]
    for word, low, high in zip(words, out[0::2], out[1::2], strict=True):
        lines += [
            f"and.b32 t, {word}, 0x77777777;",
            f"prmt.b32 v, lo, hi, t; lop3.b32 {low}, v, {word}, 0x80808080, 0xD8;",
            f"shr.u32 t, t, 16; shl.b32 u, {word}, 4;",
            f"prmt.b32 v, lo, hi, t; lop3.b32 {high}, v, u, 0x80808080, 0xD8;",
        ]
    return "\n".join([*lines, "}"])


@triton.jit
def sign_place(i):
    """The bit of a repacked word, of 16 codes, that holds the sign of code ``i``; see ``block_ptx``."""
    return i // 8 * 32 + i % 8 * 8 + 7 - i % 8 // 4 * 36


@triton.jit
def to_stream_order(codes):
    """A row of activations ``[n · 512]``, in features in order, in the order of ``nvfp4_repack``'s weights.

    Of the 512 in features of a chunk, 16 i + 4 j + k (k < 4) moves to 128 (i % 4) + 32 j + 4 (i // 4) + k.
    """
    SIZE: tl.constexpr = codes.shape[0]
    tiles = tl.reshape(codes, (SIZE // 512, 8, 4, 4, 4))
    return tl.reshape(tl.permute(tiles, (0, 2, 3, 1, 4)), (SIZE,))


@triton.jit
def _decode_kernel(
    w_ptr, s_ptr, global_scale_ptr, out_ptr, num_blocks, FP8: tl.constexpr, BLOCKS: tl.constexpr
):
    # A program takes BLOCKS scale blocks: 8 bytes and one scale each, 16 values out.
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (block < num_blocks)[:, None]
    byte = tl.load(w_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=mask, other=0).to(tl.int32)
    values = tl.reshape(tl.join(decode_e2m1(byte & 15), decode_e2m1(byte >> 4)), (BLOCKS, 16))
    # In FP8 the factor is a power of two: the product is exact before its one rounding.
    factor = 0.125 if FP8 else tl.load(global_scale_ptr)
    scale = tl.load(s_ptr + block, mask=block < num_blocks, other=0.0).to(tl.float32) * factor
    out_ptrs = out_ptr + block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptrs, (values * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def nvfp4_to_fp8_triton(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Weights [..., K] as e4m3 of ``value · block_scale · 2**-FP8_SHIFT``, for a product that runs in FP8."""
    return _decode(packed, block_scale, None, torch.float8_e4m3fn)


def dequantize_nvfp4_triton(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [..., K] in ``dtype``, all scales applied."""
    return _decode(packed, block_scale, global_scale, dtype)


def _decode(
    packed: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=dtype, device=packed.device)
    num_blocks, (blocks, num_warps) = block_scale.numel(), DECODE_TILE
    _decode_kernel[(ceil_div(num_blocks, blocks),)](
        packed,
        block_scale,
        global_scale,
        out,
        num_blocks,
        FP8=global_scale is None,
        BLOCKS=blocks,
        num_warps=num_warps,
    )
    return out


def _aot_spec(fp8: bool):
    pointers = {"w_ptr": "*u8", "s_ptr": "*fp8e4nv", "global_scale_ptr": "*fp32"}
    out = {"out_ptr": "*fp8e4nv" if fp8 else "*bf16", "num_blocks": "i32"}
    return (
        _decode_kernel,
        pointers | out,
        {"FP8": fp8, "BLOCKS": DECODE_TILE[0]},
        {"num_warps": DECODE_TILE[1]},
    )


AOT_SPECS = [_aot_spec(False), _aot_spec(True)]
