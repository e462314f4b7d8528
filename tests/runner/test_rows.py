"""Draws of the sampler: uniform, reproducible, and unrelated between seeds."""

from __future__ import annotations

import numpy as np

from outrider.kv_layout import plan_layout
from outrider.runner.rows import RowTable

NUM_ROWS, NUM_TOKENS = 64, 2000


def draws(seeds: np.ndarray) -> np.ndarray:
    """``[rows, tokens]`` numbers of requests with these seeds."""
    table = RowTable(plan_layout((False,), None, 64, 16), NUM_ROWS, 64)
    table.seed[:] = seeds
    rows = np.arange(NUM_ROWS)
    return np.stack([table.uniforms(rows, np.full(NUM_ROWS, i)) for i in range(NUM_TOKENS)], axis=1)


def test_draws_are_uniform_and_stay_inside_the_open_interval() -> None:
    """A 0 or a 1 would pick a token of probability zero."""
    values = draws(np.random.default_rng(3).integers(0, 2**63, NUM_ROWS).astype(np.uint64))
    assert values.dtype == np.float32 and values.min() > 0 and values.max() < 1
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    expected = values.size / 50
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 100  # chi-square, 49 degrees: 100 is beyond 1 in 10,000


def test_neighbouring_seeds_share_nothing() -> None:
    """With seed and index merely added, seed s + 1 would repeat seed s one token earlier."""
    values = draws(np.arange(NUM_ROWS, dtype=np.uint64))
    for shift in range(3):
        first, second = values[:-1, shift:], values[1:, : NUM_TOKENS - shift]
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
        assert not (first == second).mean() > 0.001
