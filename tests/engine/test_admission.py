"""Look-ahead admission: the closed form against a step-by-step count of blocks."""

from __future__ import annotations

import numpy as np
import pytest

from outrider.engine.admission import OutputEstimator, most_peak_blocks, peak_blocks
from outrider.engine.kv_manager import KVManager
from outrider.engine.sequence import Sequence
from outrider.kv_layout import KVLayout, plan_layout
from outrider.types import Request, SamplingParams

FULL = plan_layout((False,) * 4, None, 4096, 16)
CHUNKED = plan_layout((True, True, True, False), 64, 4096, 16)


def counted_peak(current: np.ndarray, final: np.ndarray, layout: KVLayout, lag: int) -> int:
    """Every sequence grows by a token a step and leaves ``lag`` steps after its last; the most blocks held at once."""
    books = KVManager(layout, 2, False)
    peak = 0
    for step in range(int((final - current).max()) + lag + 1):
        alive = current + step <= final + lag
        held = np.minimum(current + step, final)[alive]
        peak = max(peak, sum(books.num_blocks_for(int(n)) for n in held))
    return peak


@pytest.mark.parametrize("layout", [FULL, CHUNKED], ids=["full", "chunked"])
def test_the_peak_is_exact_and_its_quick_bound_above_it(layout: KVLayout) -> None:
    """Too low and running streams are preempted; too high and memory stays empty."""
    rng = np.random.default_rng(7)
    for _ in range(60):
        count = int(rng.integers(1, 30))
        current = rng.integers(1, 300, count)
        final = current + rng.integers(0, 300, count)
        lag = int(rng.integers(0, 4))
        exact = counted_peak(current, final, layout, lag)
        estimate, slack = peak_blocks(current, final, layout, lag), len(layout.groups) * count
        if layout.chunk_size is None:
            assert estimate == exact
        assert exact <= estimate <= exact + slack, f"{exact} counted, {estimate} estimated"
        assert estimate <= most_peak_blocks(current, final, layout, lag)


def sequence(max_tokens: int, **sampling: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Sequence(Request(request_id="r", prompt_token_ids=[1] * 10, sampling=params), 0, 1)


def test_the_expected_end_is_exact_where_it_is_known() -> None:
    """With ``ignore_eos`` and no stop of any kind the length is a fact, not a guess."""
    estimator = OutputEstimator()
    assert estimator.expected_total(sequence(700, ignore_eos=True)) == 710
    assert estimator.expected_total(sequence(700, ignore_eos=True, stop=("x",))) < 710
    assert estimator.expected_total(sequence(20)) == 30


def test_the_estimate_follows_what_finished_requests_used() -> None:
    """A guess that never learns either preempts for ever or leaves the pool half empty."""
    estimator = OutputEstimator()
    before = estimator.expected_total(sequence(4000))
    for _ in range(300):
        estimator.observe(40)
    low = estimator.expected_total(sequence(4000))
    for _ in range(300):
        estimator.observe(1500)
    high = estimator.expected_total(sequence(4000))
    assert low < before < high and 50 <= low <= 120 and 1400 <= high <= 2200
