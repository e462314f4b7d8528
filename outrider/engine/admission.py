"""Look-ahead admission: may one more sequence start without anybody being preempted later?

Called by the scheduler. Every running sequence grows by one token a step until its expected end, then gives
its blocks back. The blocks in use therefore peak just before some sequence ends; a newcomer is admitted when
no such peak exceeds the pool. The end is exact with ``ignore_eos``; otherwise it is estimated from what
finished requests used of their ``max_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
        self._known = [0, 0, 0]  # sums of the second to fourth powers of the known lengths that are live

    def follow(self, seq: Sequence, sign: int) -> None:
        """A request came (``sign`` 1) or is gone (-1)."""
        if _is_exact(seq):
            for i in range(3):
                self._known[i] += sign * seq.request.sampling.max_tokens ** (i + 2)

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
        """Whether those like it end together: known lengths that are alike, or learned ones that were.

        Known ones weigh as much as they hold of the pool over time, which grows with the square of their length.
        """
        if _is_exact(seq):
            weight, mean, square = self._known
            return weight * square - mean * mean <= (REGULAR * mean) ** 2
        return self._num_seen * self._weight > 1 and self._var**0.5 < REGULAR * self._mean

    def _bounded(self, seq: Sequence, guess: float) -> int:
        max_tokens = seq.request.sampling.max_tokens
        return max_tokens if _is_exact(seq) else min(max_tokens, int(guess))


def _is_exact(seq: Sequence) -> bool:
    """Whether no token can end the sequence before ``max_tokens``."""
    sampling = seq.request.sampling
    return sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids


def peak_blocks(current: np.ndarray, final: np.ndarray, layout: KVLayout, lag: int = 0) -> int:
    """Most blocks in use at any future step.

    ``current`` and ``final`` are int arrays ``[S]``: tokens that each sequence holds now and at its end, which come
    back ``lag`` steps later. The sum is evaluated just before each return: with the longest first, sequences ``0..k``
    hold blocks until k returns its.
    """
    held, steps, most = _by_end(current, final)
    steps = steps + lag
    tokens = np.minimum(held[None, :] + steps[:, None], most[None, :])  # [ends, sequences]
    full = -(-tokens // layout.block_size)
    per_sequence = full * layout.local.count(False)
    if layout.chunk_size is not None:  # local layers hold no more than their chunk
        local = np.minimum(full, -(-layout.chunk_size // layout.block_size) + 1)
        per_sequence += local * layout.local.count(True)
    return int(np.tril(per_sequence).sum(axis=1).max())


def most_peak_blocks(current: np.ndarray, final: np.ndarray, layout: KVLayout, lag: int = 0) -> int:
    """An upper bound of ``peak_blocks`` in linear time: every sequence wastes all but one place of a block."""
    held, steps, _ = _by_end(current, final)
    alive = np.arange(1, len(held) + 1)
    tokens = np.cumsum(held) + (steps + lag + layout.block_size - 1) * alive
    return int((tokens // layout.block_size).max()) * len(layout.local)


def _by_end(current: np.ndarray, final: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens held, steps to go, and tokens at the end, the longest to go first."""
    order = np.argsort(current - final, kind="stable")
    return current[order], (final - current)[order], final[order]


def fits(
    running: Iterable[Sequence],
    candidates: Iterable[Sequence],
    estimator: OutputEstimator,
    layout: KVLayout,
    capacity: int,
) -> bool:
    """Whether the running sequences and the candidates are expected to stay within ``capacity`` blocks."""
    sequences = [*running, *candidates]
    current = np.array([max(seq.length, seq.prompt_len) for seq in sequences])
    final = np.array([max(estimator.expected_total(seq), seq.length) for seq in sequences])
    return (
        most_peak_blocks(current, final, layout, RELEASE_LAG) <= capacity
        or peak_blocks(current, final, layout, RELEASE_LAG) <= capacity
    )


@dataclass(frozen=True, slots=True)
class Holdings:
    """Sequences that grow evenly and end: blocks held now and at the end, steps until then, each f64 ``[S]``."""

    held: np.ndarray
    at_end: np.ndarray
    steps: np.ndarray

    @classmethod
    def of_equals(cls, held: int, at_end: int, steps: int, count: int) -> Holdings:
        """``count`` equal sequences."""
        return cls(*(np.full(count, value, dtype=np.float64) for value in (held, at_end, steps)))

    def __add__(self, other: Holdings) -> Holdings:
        pairs = (self.held, other.held), (self.at_end, other.at_end), (self.steps, other.steps)
        return Holdings(*(np.concatenate(pair) for pair in pairs))

    def at_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps until each end, the last first, and the blocks in use just before it, ``[S]`` both."""
        order = np.argsort(-self.steps, kind="stable")
        ends = self.steps[order]
        growth = (self.at_end - self.held)[order] / np.maximum(ends, 1)
        return ends, np.cumsum(self.held[order]) + np.cumsum(growth) * ends


def steps_until_room(running: Holdings, group: Holdings, capacity: int, waste: float = 0.0) -> float:
    """Steps until all of ``group``, which are alike, can start together; infinite if ``running`` leaves no such room.

    Blocks in use peak just before a running sequence ends. A group that is ``age`` steps old by then holds
    ``count x (held + growth x age)``: the room at each end says how old it may be. Those that end after the group
    must leave room for its own end. ``waste``: blocks begun and not full, of each sequence on its way.
    """
    ends, in_use = running.at_ends()
    if in_use.max(initial=0) > capacity or group.at_end.sum() > capacity:
        return math.inf
    if not len(group.steps):
        return 0.0
    room = (capacity - in_use - waste * np.arange(len(ends))) / len(group.steps) - group.held[0] - waste
    oldest = np.maximum(room, 0) * group.steps[0] / max(group.at_end[0] - group.held[0], 1e-9)
    wait = float(np.maximum(ends - oldest, 0).max(initial=0))
    later = ends >= wait + group.steps[0]
    return math.inf if (in_use[later] + group.at_end.sum() > capacity).any() else wait
