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

FP8_MAX = 448.0


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
    qkv: torch.Tensor,
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
    if qkv.is_cuda:
        return qkv_rope_store_triton(qkv, positions, spec, k_cache, v_cache, slots, k_scale, v_scale)
    return qkv_rope_store_reference(qkv, positions, spec, k_cache, v_cache, slots, k_scale, v_scale)


def qkv_rope_store_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    spec: RopeSpec,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    """The contract of ``qkv_rope_store`` in plain torch: the CPU path and the test oracle."""
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
