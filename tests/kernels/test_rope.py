"""Rotation, head norm, temperature and KV store against complex float64 arithmetic."""

from __future__ import annotations

import math

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.quantize import ScaledRows
from outrider.kernels.rope import RopeSpec, qkv_rope_store_reference, qkv_rope_store_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [qkv_rope_store_reference, qkv_rope_store_triton]
FP8 = torch.float8_e4m3fn


def expected(qkv, positions, spec):
    """q, k, v in float64 with no intermediate rounding."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    x = qkv.double().view(len(qkv), -1, dim)
    qk, v = x[:, : heads + kv_heads], x[:, heads + kv_heads :]
    if spec.inv_freq is not None:
        half = dim // 2
        first = torch.arange(half) * 2 if spec.interleaved else torch.arange(half)
        second = first + 1 if spec.interleaved else first + half
        angles = positions.double()[:, None, None] * spec.inv_freq.double()
        turned = torch.complex(qk[..., first], qk[..., second]) * torch.exp(1j * angles)
        qk = torch.empty_like(qk)
        qk[..., first], qk[..., second] = turned.real, turned.imag
    if spec.qk_norm_eps is not None:
        qk = qk / torch.sqrt(qk.square().mean(-1, keepdim=True) + spec.qk_norm_eps)
    q, k = qk[:, :heads], qk[:, heads:]
    if spec.temperature is not None:
        floor_scale, attn_scale = spec.temperature
        factor = [1 + attn_scale * math.log(1 + (p + 1) // floor_scale) for p in positions.tolist()]
        q = q * torch.tensor(factor, dtype=torch.float64, device=q.device)[:, None, None]
    return q, k, v


def make(heads, kv_heads, dim, **options):
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2, device=DEVICE).float() / dim)
    return RopeSpec(heads, kv_heads, dim, options.pop("inv_freq", inv_freq), **options)


def run(op, spec, dtype, cache_dtype, block_size=16, tokens=7):
    """The op on fresh inputs: its q, the stored k and v, and what they should be."""
    torch.manual_seed(torch.seed() % 2**31)
    qkv = torch.randn(
        tokens, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, dtype=dtype, device=DEVICE
    )
    positions = torch.tensor([0, 1, 8190, 8191, 16383, 77, 12345], device=DEVICE)[:tokens]
    data = torch.full((5, 3, 2, spec.num_kv_heads, block_size, spec.head_dim), 7.0, device=DEVICE).to(
        cache_dtype
    )
    k_cache, v_cache = data[:, 1, 0], data[:, 1, 1]
    slots = torch.randperm(4 * block_size, device=DEVICE)[:tokens] + block_size
    scales = (0.5, 0.25) if cache_dtype == FP8 else (1.0, 1.0)
    q = op(qkv, positions, spec, k_cache, v_cache, slots, *scales)
    k, v = (
        c.double()[slots // block_size, :, slots % block_size] * s
        for c, s in zip((k_cache, v_cache), scales, strict=True)
    )
    untouched = int((data.double() == 7.0).flatten().sum())
    written = 2 * tokens * spec.num_kv_heads * spec.head_dim
    assert untouched >= data.numel() - written
    return (q, k, v), expected(qkv, positions, spec)


def errors(got, exact):
    return [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (5, 1, 128), (2, 2, 64)])
def test_rotation_pairs(op, interleaved, heads, kv_heads, dim):
    """Guards: the wrong pairing, a rotated v, heads mixed up, neighbours of a slot overwritten."""
    got, exact = run(op, make(heads, kv_heads, dim, interleaved=interleaved), torch.float32, torch.float32)
    # The angle p * f is a float32: at p = 16383 its rounding is worth 1e-3 radians.
    assert errors(got, exact)[0] < 5e-4
    assert errors(got, exact)[1] < 5e-4
    assert errors(got, exact)[2] == 0


@pytest.mark.parametrize("op", PATHS)
def test_norm_after_rotation(op):
    """Guards: a norm with a weight, of v, or with the wrong epsilon."""
    spec = make(5, 1, 128, interleaved=True, qk_norm_eps=0.5)
    got, exact = run(op, spec, torch.bfloat16, torch.bfloat16, 64)
    assert max(errors(got, exact)[:2]) < 6e-3
    assert errors(got, exact)[2] == 0


@pytest.mark.parametrize("op", PATHS)
def test_temperature_of_unrotated_queries(op):
    """Guards: floor((p + 1) / s) off by one around 8191, and a scaled k."""
    spec = make(3, 1, 64, inv_freq=None, interleaved=True, temperature=(8192.0, 0.1))
    got, exact = run(op, spec, torch.float32, torch.float32)
    assert errors(got, exact)[0] < 1e-6
    assert errors(got, exact)[1:] == [0, 0]


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_fp8_cache(op, block_size):
    """Guards: multiplying by the scale, exchanged k and v scales, a wrong offset inside a block."""
    got, exact = run(op, make(6, 2, 64, interleaved=False), torch.bfloat16, FP8, block_size)
    assert max(errors(got, exact)[1:]) < 0.04


@pytest.mark.parametrize("op", PATHS)
def test_fp8_overflow_is_clamped(op):
    """Guards: e4m3 has no infinity, so an unclamped cast stores NaN."""
    spec = make(1, 1, 64, inv_freq=None, interleaved=True)
    cache = torch.zeros(2, 2, 1, 16, 64, device=DEVICE).to(FP8)
    qkv = torch.full((1, 3 * 64), 1e6, device=DEVICE)
    slot = torch.tensor([17], device=DEVICE)
    op(qkv, torch.zeros(1, dtype=torch.int64, device=DEVICE), spec, cache[:, 0], cache[:, 1], slot, 0.1, 0.1)
    assert torch.all(cache[1, :, 0, 1].float() == 448)


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_rows_without_their_scales_are_those_with_them(op, interleaved, cache_dtype):
    """Guards: another token's scale, or v, k or q left without it; a scale that comes behind the head norm."""
    spec = make(9, 3, 64, interleaved=interleaved, qk_norm_eps=1e-5)
    qkv = torch.randn(5, 15 * 64, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.exp2(torch.randint(-9, 5, (5,), device=DEVICE).float())
    positions = torch.randint(1000, (5,), device=DEVICE)
    slots = torch.randperm(32, device=DEVICE)[:5] + 16
    results = []
    for rows in ((qkv.double() * scale.double()[:, None]).bfloat16(), ScaledRows(qkv, scale)):
        cache = torch.zeros(3, 2, 3, 16, 64, device=DEVICE).to(cache_dtype)
        q = op(rows, positions, spec, cache[:, 0], cache[:, 1], slots, 0.5, 0.25)
        results.append((q, cache.float()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
