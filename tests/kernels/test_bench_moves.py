"""The suite ``benchmarks.kernels.moves`` at small sizes: what it checks, and the bytes of its floors."""

from __future__ import annotations

from types import SimpleNamespace

import exact_casts  # noqa: F401
import pytest
import torch

from benchmarks.kernels import moves


@pytest.fixture
def rows(monkeypatch):
    """A report that keeps ``(case, variant, bytes)`` of each row; every call is made once instead of timed."""
    kept = []

    def memory(case, variant, us, num_bytes, bytes_per_s=None):
        assert us > 0
        kept.append((case, variant, num_bytes))

    def count(calls):
        return float(len([call() for call in calls]))

    monkeypatch.setattr(moves, "graph_us", count)
    monkeypatch.setattr(moves, "sets", lambda _: 2)
    return SimpleNamespace(memory=memory, kept=kept)


def test_embedding(rows, monkeypatch):
    """Guards the lookup's row: its bytes are counted once, and rows of other tokens stop it."""
    table = torch.randn(40, 64).bfloat16()
    if moves.DEVICE.type == "cuda":
        table = table.pin_memory()
    moves.bench_embedding(rows, table, 7, 1e9)
    assert rows.kept == [("embedding T=7", "table of the host", 7 * 64 * 2)]
    lookup = moves.embedding_triton
    monkeypatch.setattr(moves, "embedding_triton", lambda ids, table: lookup((ids + 1) % 40, table))
    with pytest.raises(SystemExit, match="embedding: relative error"):
        moves.bench_embedding(rows, table, 7, 1e9)


def test_decode(rows, monkeypatch):
    """Guards the rows of decoded weights: 4 bits and a sixteenth of a byte in, one or two bytes out."""
    moves.bench_decode(rows, "w", 32, 64)
    read = 32 * 64 // 2 + 32 * 64 // 16
    assert [row[1:] for row in rows.kept] == [("to bf16", read + 32 * 64 * 2), ("to fp8", read + 32 * 64)]
    monkeypatch.setattr(moves, "FP8_SHIFT", moves.FP8_SHIFT + 1)
    with pytest.raises(SystemExit, match="nvfp4 to fp8"):
        moves.bench_decode(rows, "w", 32, 64)


@pytest.mark.parametrize(("num_splits", "context", "used"), [(3, 600, 3), (4, 300, 3), (2, 64, 1)])
def test_merge(rows, monkeypatch, num_splits, context, used):
    """Guards the merge's row, with splits that no token falls into too."""
    monkeypatch.setattr(moves, "H", 2)
    moves.bench_merge(rows, 2, num_splits, context)
    assert rows.kept == [(f"merge 2 x {num_splits} splits", "", 2 * 2 * (used * 129 * 4 + 256))]
