"""The order in which NVFP4 expert weights are kept for ``nvfp4_stream``, and everything that writes or reads it.

Called by ``quant`` once after loading, and by the launchers of ``moe``. Repacked tensors have the checkpoint's shapes
and sizes and nothing else of its order:

* gate and up rows alternate in eights (``gated``), so the two products of a column meet in one thread;
* a tile of 64 rows x 512 in features is contiguous, words in the order in which wgmma's lanes want them;
* in a word of eight codes the signs move away from their codes (see ``nvfp4_stream``);
* a scale byte is the e4m3 code of scale / 16, bit 7 set where 1.5 x scale rounds up. Blocks whose scale is below
  1/4 are rounded anew to scale 1/4 (at most 1/1792 of the largest block's error).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import power_of_two_at_least
from outrider.kernels.moe_dispatch import ROW_PADDING
from outrider.kernels.nvfp4_decode import sign_place, to_stream_order
from outrider.kernels.quantize import row_scale, to_fp8

CHUNK = 512
"""In features of a repacked tile: 32 scale blocks."""

TILE_ROWS = 64
"""Weight rows of a repacked tile."""

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_WORDS = TILE_ROWS * CHUNK // 16

WARPS = 8
"""Of both kernels. Repacking is not tuned: it runs once, at load. Quantising:

H200, 2026-11-26, 400 / 1,315 / 8,192 rows of 8,192: 5.1 / 10.7 / 55.6 us, 4 or 16 warps the same, in parts of 1,024
7.5 / 16.2 / 70.3: benchmarks/results/trials_h200.txt
"""


def can_repack(num_rows: int, depth: int, gated: bool) -> bool:
    """Whether a matrix [num_rows, depth] divides into repacked tiles."""
    return num_rows % (2 * TILE_ROWS if gated else TILE_ROWS) == 0 and depth % CHUNK == 0


@triton.jit
def _find_word(index, num_words):
    """Row in its tile and block in its chunk of the word at ``index`` of a repacked tile: h r8 cp | w g q | e."""
    local = index % num_words
    row = local // 64 % 4 * 16 + local // 512 % 2 * 8 + local // 8 % 8
    block = local // 1024 * 16 + local // 2 % 4 * 4 + local // 256 % 2 * 2 + local % 2
    return row, block


@triton.jit
def _scale_place(row, block):
    """Where the scale of a block stands in its tile's 2,048 bytes: w g q | h r8 cp e."""
    lane = row // 16 * 32 + row % 8 * 4 + block // 4 % 4
    return lane * 16 + block // 16 * 8 + row // 8 % 2 * 4 + block % 4


@triton.jit
def _source_row(row, num_rows, GATED: tl.constexpr):
    """The checkpoint's row that repacked row ``row`` holds."""
    if GATED:
        return row // 16 * 8 + row % 8 + row // 8 % 2 * (num_rows // 2)
    return row


@triton.jit
def _rescale(word, ratio):
    """The codes of ``word``'s values times ``ratio`` <= 1, rounded to nearest even."""
    out = tl.zeros_like(word)
    for i in tl.static_range(16):
        code = (word >> (4 * i)) & 15
        magnitude = (code & 7).to(tl.int32)
        fraction = (magnitude & 1).to(tl.float32) * 0.5
        exponent = magnitude >> 1
        value = tl.where(exponent == 0, fraction, (1.0 + fraction) * tl.exp2(exponent.to(tl.float32) - 1.0))
        value = value * ratio
        rounded = (value > 0.25).to(tl.int64) + (value >= 0.75) + (value > 1.25) + (value >= 1.75)
        rounded = rounded + (value > 2.5) + (value >= 3.5) + (value > 5.0)
        out = out | ((rounded | (code & 8)) << (4 * i))
    return out


@triton.jit
def _repack_kernel(
    w_ptr, s_ptr, w_out_ptr, s_out_ptr, num_rows, num_blocks, GATED: tl.constexpr, WORDS: tl.constexpr
):
    # One program a tile. int64 words: a shift right of a negative one is masked afterwards.
    tile = tl.program_id(0)
    chunks = num_blocks // 32
    index = tl.arange(0, WORDS)
    row, block = _find_word(index, WORDS)
    source_row = _source_row(tile // chunks * 64 + row, num_rows, GATED)
    source = source_row.to(tl.int64) * num_blocks + tile % chunks * 32 + block
    word = tl.load(w_ptr + source)
    scale = tl.load(s_ptr + source).to(tl.int32)  # e4m3 bits, never negative
    if tl.min(scale, 0) < 40:  # 1/4
        mantissa = (scale & 7).to(tl.float32)
        exponent = (scale >> 3).to(tl.float32)
        value = tl.where(scale < 8, mantissa / 512.0, (8.0 + mantissa) * tl.exp2(exponent - 10.0))
        word = tl.where(scale < 40, _rescale(word, tl.minimum(value * 4.0, 1.0)), word)
        scale = tl.maximum(scale, 40)
    out = word & 0x7777777777777777
    for half in tl.static_range(2):
        for i in tl.static_range(8):
            sign = (word >> (32 * half + 4 * i + 3)) & 1
            out = out | (sign << (32 * half + (8 * i + 7 if i < 4 else 8 * i - 29)))
    tl.store(w_out_ptr + tile.to(tl.int64) * WORDS + index, out)
    mantissa = scale & 7
    up = ((mantissa >= 1) & (mantissa <= 5)).to(tl.int32)
    packed = (scale - 32) | (up << 7)
    tl.store(s_out_ptr + tile.to(tl.int64) * WORDS + _scale_place(row, block), packed.to(tl.uint8))


@triton.jit
def _quantize_stream_kernel(x_ptr, out_ptr, scale_ptr, row_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < row_size
    x = tl.load(x_ptr + row * row_size + columns, mask=mask, other=0.0).to(tl.float32)
    scale = row_scale(x)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * row_size + columns, to_stream_order(to_fp8(x, scale)), mask=mask)


def repack_nvfp4_(packed: torch.Tensor, block_scale: torch.Tensor, gated: bool) -> None:
    """Reorder u8 [E, N, K/2] and e4m3 [E, N, K/16] in place; ``gated``: rows are gate rows, then up rows."""
    num_rows, num_blocks = block_scale.shape[-2:]
    for words, scales in zip(packed.view(torch.int64), block_scale.view(torch.uint8), strict=True):
        new_words, new_scales = torch.empty_like(words), torch.empty_like(scales)
        _repack_kernel[(num_rows * num_blocks // _WORDS,)](
            words,
            scales,
            new_words,
            new_scales,
            num_rows,
            num_blocks,
            GATED=gated,
            WORDS=_WORDS,
            num_warps=WARPS,
        )
        words.copy_(new_words)
        scales.copy_(new_scales)


def unpack_reference(packed: torch.Tensor, block_scale: torch.Tensor, gated: bool) -> torch.Tensor:
    """One repacked matrix, u8 [N, K/2] and e4m3 [N, K/16], as exact f32 [N, K] in the checkpoint's order."""
    num_rows, num_blocks = block_scale.shape
    index = torch.arange(num_rows * num_blocks, device=packed.device)
    tile, (row, block) = index // _WORDS, _find_word.fn(index, _WORDS)
    chunks = num_blocks // (CHUNK // 16)
    source_row = _source_row.fn(tile // chunks * TILE_ROWS + row, num_rows, gated)
    word = packed.view(torch.int64).flatten()
    byte = block_scale.view(torch.uint8).flatten()[tile * _WORDS + _scale_place.fn(row, block)]
    scale = ((byte & 127) + 32).view(torch.float8_e4m3fn).float()
    values = torch.empty(num_rows, num_blocks, 16, device=packed.device)
    magnitudes = torch.tensor(E2M1_MAGNITUDES, device=packed.device)
    for i in range(16):
        sign = (word >> sign_place.fn(i)) & 1
        values[source_row, tile % chunks * (CHUNK // 16) + block, i] = (
            magnitudes[(word >> (4 * i)) & 7] * (1 - 2 * sign) * scale
        )
    return values.flatten(1)


def quantize_stream(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x[R, K]`` to e4m3 with a scale a row f32 [R], columns in stream order, spare rows behind."""
    num_rows, row_size = x.shape
    out = torch.empty((num_rows + ROW_PADDING, row_size), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = power_of_two_at_least(row_size, CHUNK)
    _quantize_stream_kernel[(num_rows,)](x, out, scale, row_size, BLOCK=block, num_warps=WARPS)
    return out, scale


AOT_SPECS = [
    (
        _repack_kernel,
        {
            "w_ptr": "*i64",
            "s_ptr": "*u8",
            "w_out_ptr": "*i64",
            "s_out_ptr": "*u8",
            "num_rows": "i32",
            "num_blocks": "i32",
        },
        {"GATED": True, "WORDS": _WORDS},
        {"num_warps": WARPS},
    ),
    (
        _quantize_stream_kernel,
        {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "row_size": "i32"},
        {"BLOCK": 8192},
        {"num_warps": WARPS},
    ),
]
