"""Rope, cache store and attention in one launch against the two ops that it replaces."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels._dispatch import arrival_counters
from outrider.kernels.attention_decode import DecodeTile
from outrider.kernels.rope import RopeSpec
from outrider.kernels.rope_attention import rope_attention, rope_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn


def make(lengths, kv_heads, group, dim, block_size, dtype):
    """``(qkv, caches, slots, tables, lengths)``: what no query may read is NaN, the new slots included."""
    width = -(-max(lengths) // block_size)
    num_blocks = 1 + width * len(lengths)
    data = torch.randn(num_blocks, 3, 2, kv_heads, block_size, dim)
    data[0] = float("nan")
    tables = (1 + torch.randperm(num_blocks - 1)).view(len(lengths), width).int()
    slots = []
    for row, length in zip(tables, lengths, strict=True):
        row[-(-length // block_size) :] = 0
        slots.append(0)
        if length:
            offset = (length - 1) % block_size
            block = int(row[(length - 1) // block_size])
            data[block, ..., offset:, :] = float("nan")
            slots[-1] = block * block_size + offset
    data = data.to(DEVICE).to(dtype)
    query_dtype = torch.bfloat16 if dtype == FP8 else dtype
    qkv = torch.randn(len(lengths), kv_heads * (group + 2) * dim).to(DEVICE).to(query_dtype)
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return qkv, data, torch.tensor(slots, device=DEVICE), tables.to(DEVICE), lens


SPECS = {
    "norm": {"interleaved": True, "qk_norm_eps": 1e-2},
    "halves": {"interleaved": False},
    "temperature": {"interleaved": True, "inv_freq": None, "temperature": (8.0, 0.5)},
}
SHAPES = [
    # kv_heads, group, dim, block_size, chunk, dtype
    (2, 5, 128, 64, None, FP8),
    (1, 3, 64, 32, 96, FP8),
    (3, 1, 64, 16, None, torch.float32),
    (2, 2, 64, 64, 48, torch.bfloat16),
]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize(("kv_heads", "group", "dim", "block_size", "chunk", "dtype"), SHAPES)
@pytest.mark.parametrize("tile", [DecodeTile(64, 4, 1, 4, 8), DecodeTile(32, 4, 1, 1, 2)])
@pytest.mark.parametrize("quantize", [False, True])
def test_one_launch(kind, kv_heads, group, dim, block_size, chunk, dtype, tile, quantize):
    """Guards: a new key or value read from memory or stored elsewhere, a split left out, a padding row that stores."""
    lengths = [1, 200, 0, 64, 65, 129]
    heads = kv_heads * group
    inv_freq = 10000.0 ** (-torch.arange(0, dim, 2, device=DEVICE).float() / dim)
    spec = RopeSpec(heads, kv_heads, dim, **{"inv_freq": inv_freq, **SPECS[kind]})
    out_scale = torch.rand((), device=DEVICE) / 50 + 0.01 if quantize else None
    scales = (0.05, 0.06) if dtype == FP8 else (1.0, 1.0)
    for _ in range(2):  # the second call meets the counters as the first left them
        qkv, data, slots, tables, lens = make(lengths, kv_heads, group, dim, block_size, dtype)
        other = data.clone()
        rest = (slots, tables, lens, max(lengths), dim**-0.5, chunk, *scales, out_scale)
        expected = rope_attention_reference(qkv, spec, other[:, 1, 0], other[:, 1, 1], *rest)
        out = rope_attention(qkv, spec, data[:, 1, 0], data[:, 1, 1], *rest, tile)
        assert out.dtype == expected.dtype and out.shape == expected.shape
        assert not out[2].float().any() and not arrival_counters(out.device).any()
        wide, exact = out.double(), expected.double()
        assert float((wide - exact).norm() / exact.norm()) < (0.04 if quantize else 0.01)
        # Where several paddings store, nobody reads; rounding may move a stored value to the next code.
        stored, exact = data[1:].double(), other[1:].double()
        assert torch.equal(stored.isnan(), exact.isnan())
        gap = (stored - exact).nan_to_num()
        assert float(gap.norm() / exact.nan_to_num().norm()) < 0.01
