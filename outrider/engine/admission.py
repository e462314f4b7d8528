"""Look-ahead admission: may one more sequence start without anybody being preempted later?

Called by the scheduler. Every running sequence grows by one token a step until its expected end, then gives
its blocks back. The blocks in use therefore peak just before some sequence ends; a newcomer is admitted when
no such peak exceeds the pool. The end is exact with ``ignore_eos``; otherwise it is estimated from what
finished requests used of their ``max_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from outrider.engine.sequence import Sequence
from outrider.kv_layout import KVLayout


class OutputEstimator:
    """Expected output length of a request, learned from the finished ones.

    Keeps running moments of the output lengths; the estimate is mean plus one deviation, so that about one
    request in six outlives it, and those are covered by the headroom that shorter ones leave.
    """

    def __init__(self, initial_tokens: float = 256.0, weight: float = 0.02) -> None:
        self._mean = initial_tokens
        self._var = 0.0
        self._weight = weight

    def observe(self, num_outputs: int) -> None:
        """A request ended by itself after ``num_outputs`` tokens."""
        delta = num_outputs - self._mean
        self._mean += self._weight * delta
        self._var = (1 - self._weight) * (self._var + self._weight * delta * delta)

    def expected_total(self, seq: Sequence) -> int:
        """Tokens (prompt and output) that the sequence is expected to reach; never below what it has."""
        sampling = seq.request.sampling
        if sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids:
            return seq.prompt_len + sampling.max_tokens
        expected = max(self._mean + self._var**0.5, sampling.min_tokens, seq.num_outputs * 1.25 + 1)
        return seq.prompt_len + min(sampling.max_tokens, int(expected))


def peak_blocks(current: np.ndarray, final: np.ndarray, layout: KVLayout) -> int:
    """Most blocks in use at any future step, rounded up to whole blocks per sequence.

    ``current`` and ``final`` are int arrays ``[S]``: tokens that each sequence holds now and at its end. The sum
    is evaluated just before each end: with the longest first, sequences ``0..k`` live until sequence k ends.
    """
    order = np.argsort(current - final, kind="stable")
    held, steps = current[order], (final - current)[order]
    alive = np.arange(1, len(order) + 1)
    if layout.chunk_size is None or final.max() <= layout.chunk_size:
        tokens = np.cumsum(held) + steps * alive
        blocks = (tokens + alive * (layout.block_size - 1)) // layout.block_size
        return int(blocks.max()) * len(layout.local)
    # Local layers saturate at their chunk, so the sum is no longer linear in time: [ends, sequences].
    tokens = held[None, :] + steps[:, None]
    full = -(-tokens // layout.block_size)
    local = np.minimum(full, -(-layout.chunk_size // layout.block_size) + 1)
    per_sequence = full * layout.local.count(False) + local * layout.local.count(True)
    return int(np.tril(per_sequence).sum(axis=1).max())


def fits(
    running: Iterable[Sequence],
    candidate: Sequence,
    estimator: OutputEstimator,
    layout: KVLayout,
    capacity: int,
) -> bool:
    """Whether the running sequences and the candidate are expected to stay within ``capacity`` blocks."""
    sequences = [*running, candidate]
    current = np.array([max(seq.length, seq.prompt_len) for seq in sequences])
    final = np.array([max(estimator.expected_total(seq), seq.length) for seq in sequences])
    return peak_blocks(current, final, layout) <= capacity
