"""Look-ahead admission: may one more sequence start without anybody being preempted later, and should it start now?

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

RELEASE_LAG = 2
"""Steps between the plan of a sequence's last token and the return of its blocks: what is in flight is not free."""

REGULAR = 0.2
"""Standard deviation of output lengths, over their mean, below which requests that start together end together."""


class OutputEstimator:
    """Expected output length of a request, learned from the finished ones.

    Keeps running moments of the output lengths; the estimate is mean plus one deviation, so that about one
    request in six outlives it, and those are covered by the headroom that shorter ones leave.
    """

    def __init__(self, initial_tokens: float = 256.0, weight: float = 0.02) -> None:
        self._mean = initial_tokens
        self._var = 0.0
        self._weight = weight
        self._num_seen = 0

    def observe(self, num_outputs: int) -> None:
        """A request ended by itself after ``num_outputs`` tokens."""
        self._num_seen += 1
        delta = num_outputs - self._mean
        self._mean += self._weight * delta
        self._var = (1 - self._weight) * (self._var + self._weight * delta * delta)

    def expected_total(self, seq: Sequence) -> int:
        """Tokens (prompt and output) that the sequence is expected to reach; never below what it has."""
        least = max(seq.request.sampling.min_tokens, seq.num_outputs * 1.25 + 1)
        return seq.prompt_len + self._bounded(seq, max(self._mean + self._var**0.5, least))

    def mean_outputs(self, seq: Sequence) -> int:
        """Tokens that sequences like it generate on average."""
        return self._bounded(seq, max(self._mean, seq.request.sampling.min_tokens))

    def is_regular(self, seq: Sequence) -> bool:
        """Whether its length is known, or those before it were so alike that it is as good as known."""
        has_learned = self._num_seen * self._weight > 1
        return _is_exact(seq) or (has_learned and self._var**0.5 < REGULAR * self._mean)

    def _bounded(self, seq: Sequence, guess: float) -> int:
        max_tokens = seq.request.sampling.max_tokens
        return max_tokens if _is_exact(seq) else min(max_tokens, int(guess))


def _is_exact(seq: Sequence) -> bool:
    """Whether no token can end the sequence before ``max_tokens``."""
    sampling = seq.request.sampling
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


def peak_blocks(current: np.ndarray, final: np.ndarray, layout: KVLayout) -> int:
    """Most blocks in use at any future step.

    ``current`` and ``final`` are int arrays ``[S]``: tokens that each sequence holds now and at its end. The sum
    is evaluated just before each end: with the longest first, sequences ``0..k`` live until sequence k ends.
    """
    held, steps = _by_end(current, final)
    full = -(-(held[None, :] + steps[:, None]) // layout.block_size)  # [ends, sequences]
    per_sequence = full * layout.local.count(False)
    if layout.chunk_size is not None:  # local layers hold no more than their chunk
        local = np.minimum(full, -(-layout.chunk_size // layout.block_size) + 1)
        per_sequence += local * layout.local.count(True)
    return int(np.tril(per_sequence).sum(axis=1).max())


def most_peak_blocks(current: np.ndarray, final: np.ndarray, layout: KVLayout) -> int:
    """An upper bound of ``peak_blocks`` in linear time: every sequence wastes all but one place of a block."""
    held, steps = _by_end(current, final)
    alive = np.arange(1, len(held) + 1)
    tokens = np.cumsum(held) + (steps + layout.block_size - 1) * alive
    return int((tokens // layout.block_size).max()) * len(layout.local)


def _by_end(current: np.ndarray, final: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens held and steps to go, the longest to go first."""
    order = np.argsort(current - final, kind="stable")
    return current[order], (final - current)[order]


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
    final = np.array([max(estimator.expected_total(seq), seq.length) + RELEASE_LAG for seq in sequences])
    return (
        most_peak_blocks(current, final, layout) <= capacity
        or peak_blocks(current, final, layout) <= capacity
    )


class Pacer:
    """Spreads the starts of requests of like length while more of them are live than fit together.

    Such requests, started together, end together, and until then the room kept for their common end is idle: a quarter
    of the pool, for answers as long as their prompts. Spread evenly they fill the pool all the time. A request holds
    its blocks for a number of steps, an area of blocks x steps, and every step the pool offers ``capacity`` of it; a
    start is paid with its area and waits until the last one is paid off (Little's law: rate = capacity / area).
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._balance = self._most = capacity

    def next_step(self) -> None:
        """The pool offers another step; no more than one start is saved up."""
        self._balance = min(self._most, self._balance + self._capacity)

    @property
    def may_start(self) -> bool:
        """Whether the starts so far are paid off."""
        return self._balance > 0

    def pay(self, area: int) -> None:
        """A request starts that is expected to take ``area``, blocks times steps."""
        self._balance -= area
        self._most = max(self._capacity, area)

    def refund(self, area: int) -> None:
        """A request ended with ``area`` left of what it paid (negative: it took more)."""
        self._balance = min(self._most, self._balance + area)
