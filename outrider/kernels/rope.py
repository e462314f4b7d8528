"""From the fused q/k/v projection to attention's inputs: rotate, normalise, scale, store in the KV cache.

Called once per attention layer, before ``attention``. Which layers rotate, normalise or scale is said by the
``RopeSpec`` that the model builds once per layer; this file knows no architecture. Order and rounding follow
transformers' Llama 4: rotation in float32, cast, weightless RMS norm per head, cast; temperature on q alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu
from outrider.kernels.overlap import overlap_options, wait_for_inputs
from outrider.kernels.quantize import FP8_MAX, Product, ScaledRows, apply_scale, to_fp8

HEADS_PER_PROGRAM, WARPS = 8, 2
"""Launch constants.

H200, 2026-11-26, 400 / 1,315 / 8,192 tokens: 6.9 / 15.7 / 82.2 us; 16 heads 6.9 / 15.6 / 79.6, 32 in 4 warps 7.9 /
19.0 / 96.6, 64 in 4 warps 7.5 / 16.4 / 77.2: benchmarks/results/trials_h200.txt
"""


@dataclass(frozen=True, eq=False, slots=True)
class RopeSpec:
    """What happens to a layer's queries and keys.

    ``inv_freq`` float32 ``[D/2]`` (None: no rotation). ``interleaved``: pairs are adjacent (2j, 2j+1), else
    (j, j + D/2). ``qk_norm_eps``: RMS norm of q and k over the head after the rotation (None: off).
    ``temperature = (floor_scale, attn_scale)``: q times ``1 + attn_scale * ln(1 + floor((p + 1) / floor_scale))``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    inv_freq: torch.Tensor | None
    interleaved: bool
    qk_norm_eps: float | None = None
    temperature: tuple[float, float] | None = None


def qkv_rope_store(
    qkv: Product,
    positions: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    """Return ``q [T, H, D]`` ready for attention; write this step's k and v into the cache.

    ``qkv [T, (H + 2K) * D]``; ``positions`` int64 ``[T]``; caches are (strided) ``[num_blocks, K, block_size, D]``;
    ``slots`` int64 ``[T]`` = ``block_id * block_size + offset``. An FP8 cache holds ``x / scale`` clamped to +-448;
    for other dtypes the scales are ignored. Tokens may share a slot only in block 0, which is never read.
    """
    if on_gpu(positions):
        return qkv_rope_store_triton(qkv, positions, spec, k_cache, v_cache, slots, k_scale, v_scale)
    return qkv_rope_store_reference(qkv, positions, spec, k_cache, v_cache, slots, k_scale, v_scale)


def qkv_rope_store_reference(
    qkv: Product,
    positions: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    """The contract of ``qkv_rope_store`` in plain torch: the CPU path and the test oracle."""
    qkv = qkv.tensor() if isinstance(qkv, ScaledRows) else qkv
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    x = qkv.view(qkv.shape[0], heads + 2 * kv_heads, spec.head_dim)
    qk, v = x.split((heads + kv_heads, kv_heads), dim=1)
    if spec.inv_freq is not None:
        qk = _rotate(qk, positions, spec.inv_freq, spec.interleaved)
    if spec.qk_norm_eps is not None:
        qk = F.rms_norm(qk.float(), (spec.head_dim,), None, spec.qk_norm_eps).to(qkv.dtype)
    q, k = qk.split((heads, kv_heads), dim=1)
    if spec.temperature is not None:
        floor_scale, attn_scale = spec.temperature
        steps = torch.floor((positions.float() + 1) / floor_scale)
        q = (q.float() * (torch.log1p(steps) * attn_scale + 1)[:, None, None]).to(qkv.dtype)
    block_size = k_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = _as_stored(k, k_scale, k_cache.dtype)
    v_cache[blocks, :, offsets] = _as_stored(v, v_scale, v_cache.dtype)
    return q


def _rotate(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the head pairs of ``x [T, heads, D]`` by ``position * inv_freq`` radians, in float32."""
    angles = positions[:, None, None] * inv_freq
    wide = x.float()
    if interleaved:
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    else:
        cos, sin = angles.cos(), angles.sin()
        a, b = wide.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.to(x.dtype)


def _as_stored(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``x`` as the cache keeps it."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(dtype)


@triton.jit
def load_pairs(rows, inside, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads that start at the pointers ``rows [R, 1]``: the first and the second of every pair, ``[R, D / 2]`` each."""
    HALF: tl.constexpr = D // 2
    if INTERLEAVED:
        both = tl.load(rows + tl.arange(0, D)[None, :], mask=inside, other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    else:
        pairs = tl.arange(0, HALF)[None, :]
        first = tl.load(rows + pairs, mask=inside, other=0.0)
        second = tl.load(rows + HALF + pairs, mask=inside, other=0.0)
    return first, second


@triton.jit
def turn_pairs(
    first, second, is_q, is_v, position, cos, sin, norm_eps, floor_scale, attn_scale,
    D: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """What ``load_pairs`` gave as queries and keys should be, in float32; rows of v stay as they are."""
    dtype: tl.constexpr = first.dtype
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if ROTATE:
        turned = tl.where(is_v[:, None], a, a * cos[None, :] - b * sin[None, :])
        b = tl.where(is_v[:, None], b, b * cos[None, :] + a * sin[None, :]).to(dtype).to(tl.float32)
        a = turned.to(dtype).to(tl.float32)
    if NORM:
        squares = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D
        inv_rms = tl.where(is_v, 1.0, tl.rsqrt(squares + norm_eps))[:, None]
        a = (a * inv_rms).to(dtype).to(tl.float32)
        b = (b * inv_rms).to(dtype).to(tl.float32)
    if TEMPERATURE:
        steps = tl.floor((position + 1.0) / floor_scale)
        factor = tl.where(is_q, tl.log(steps + 1.0) * attn_scale + 1.0, 1.0)[:, None]
        a = a * factor
        b = b * factor
    return a, b


@triton.jit
def _qkv_rope_store_kernel(
    qkv_ptr,
    qkv_scale_ptr,
    positions_ptr,
    inv_freq_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    qkv_stride,
    block_stride,
    head_stride,
    norm_eps,
    floor_scale,
    attn_scale,
    k_scale,
    v_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program takes ``BLOCK`` consecutive heads (of q, k or v) of one token, as two halves of every pair."""
    wait_for_inputs(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    half: tl.constexpr = D // 2
    pairs = tl.arange(0, half)
    is_q = heads < HEADS
    is_k = (heads >= HEADS) & (heads < HEADS + KV_HEADS)
    is_v = (heads >= HEADS + KV_HEADS) & (heads < HEADS + 2 * KV_HEADS)
    rows = qkv_ptr + token * qkv_stride + heads[:, None] * D
    first, second = load_pairs(rows, (is_q | is_k | is_v)[:, None], D, INTERLEAVED)
    if IS_SCALED:
        scale = tl.load(qkv_scale_ptr + token)
        first = apply_scale(first, scale)
        second = apply_scale(second, scale)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    position = tl.load(positions_ptr + token).to(tl.float32)
    cos = 1.0
    sin = 0.0
    if ROTATE:
        angles = position * tl.load(inv_freq_ptr + pairs)
        cos = tl.cos(angles)
        sin = tl.sin(angles)
    a, b = turn_pairs(
        first, second, is_q, is_v, position, cos, sin, norm_eps, floor_scale, attn_scale,
        D, ROTATE, NORM, TEMPERATURE,
    )  # fmt: skip
    slot = tl.load(slots_ptr + token)
    cell = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * D
    q_rows = q_ptr + (token * HEADS + heads)[:, None] * D
    k_rows = k_ptr + cell + (heads - HEADS)[:, None] * head_stride
    v_rows = v_ptr + cell + (heads - HEADS - KV_HEADS)[:, None] * head_stride
    if INTERLEAVED:
        out = tl.reshape(tl.join(a, b), [BLOCK, D])
        cols = tl.arange(0, D)[None, :]
        tl.store(q_rows + cols, out.to(dtype), mask=is_q[:, None])
        _store_kv(k_rows + cols, out, k_scale, is_k[:, None], FP8)
        _store_kv(v_rows + cols, out, v_scale, is_v[:, None], FP8)
    else:
        for part in tl.static_range(2):
            cols = (pairs + part * half)[None, :]
            out = a if part == 0 else b
            tl.store(q_rows + cols, out.to(dtype), mask=is_q[:, None])
            _store_kv(k_rows + cols, out, k_scale, is_k[:, None], FP8)
            _store_kv(v_rows + cols, out, v_scale, is_v[:, None], FP8)


@triton.jit
def _store_kv(ptr, x, scale, mask, FP8: tl.constexpr):
    if FP8:
        tl.store(ptr, to_fp8(x, scale), mask=mask)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


def qkv_rope_store_triton(
    qkv: Product,
    positions: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    """One launch over tokens and groups of heads; see ``qkv_rope_store``."""
    heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    qkv, qkv_scale = (qkv.y, qkv.scale) if isinstance(qkv, ScaledRows) else (qkv, None)
    num_tokens = qkv.shape[0]
    q = torch.empty((num_tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    floor_scale, attn_scale = spec.temperature or (1.0, 0.0)
    _qkv_rope_store_kernel[(num_tokens, ceil_div(heads + 2 * kv_heads, HEADS_PER_PROGRAM))](
        qkv,
        qkv_scale,
        positions,
        spec.inv_freq,
        q,
        k_cache,
        v_cache,
        slots,
        qkv.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        spec.qk_norm_eps or 0.0,
        floor_scale,
        attn_scale,
        k_scale,
        v_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        IS_SCALED=qkv_scale is not None,
        ROTATE=spec.inv_freq is not None,
        INTERLEAVED=spec.interleaved,
        NORM=spec.qk_norm_eps is not None,
        TEMPERATURE=spec.temperature is not None,
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        BLOCK=HEADS_PER_PROGRAM,
        num_warps=WARPS,
        **overlap_options(qkv.device, num_tokens),
    )
    return q


_POINTERS = {
    "qkv_ptr": "*bf16",
    "qkv_scale_ptr": "*fp32",
    "positions_ptr": "*i64",
    "inv_freq_ptr": "*fp32",
    "q_ptr": "*bf16",
    "k_ptr": "*fp8e4nv",
    "v_ptr": "*fp8e4nv",
    "slots_ptr": "*i64",
}
_NUMBERS = {
    "qkv_stride": "i32",
    "block_stride": "i32",
    "head_stride": "i32",
    "norm_eps": "fp32",
    "floor_scale": "fp32",
    "attn_scale": "fp32",
    "k_scale": "fp32",
    "v_scale": "fp32",
}
_SHAPE = {
    "HEADS": 40,
    "KV_HEADS": 8,
    "D": 128,
    "BLOCK_SIZE": 64,
    "FP8": True,
    "BLOCK": HEADS_PER_PROGRAM,
    "IS_SCALED": False,
    "OVERLAP": True,
}
_SCALED = {"IS_SCALED": True, "OVERLAP": False}
_ROTATED = {"ROTATE": True, "NORM": True, "TEMPERATURE": False}
_STAYS = {"ROTATE": False, "NORM": False, "TEMPERATURE": True}
AOT_SPECS = [
    (
        _qkv_rope_store_kernel,
        {**_POINTERS, **_NUMBERS},
        {**_SHAPE, **form, "INTERLEAVED": interleaved},
        {"num_warps": WARPS},
    )
    for form, interleaved in (
        (_ROTATED, True),
        (_ROTATED | _SCALED, True),
        (_ROTATED, False),
        (_STAYS, True),
    )
]
