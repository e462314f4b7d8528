"""Where the live sequences are: waiting, held or running. Kept by ``scheduler``, read by ``starts``."""

from __future__ import annotations

import bisect
from collections import deque

from outrider.engine.sequence import Sequence, SequenceStatus


class Queues:
    """The live sequences by status: ``waiting`` in the order in which they start, the others by age.

    ``by_priority``: those that wait start in the order of their priorities, then of their arrival.
    """

    def __init__(self, *, by_priority: bool) -> None:
        self.waiting: deque[Sequence] = deque()
        self.held: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._by_priority = by_priority

    @property
    def next_up(self) -> Sequence | None:
        """Whose turn is next: one that ran before, then the oldest one held, then the first that waits."""
        if self.waiting and self.waiting[0].paid:
            return self.waiting[0]
        if self.held:
            return self.held[0]
        return self.waiting[0] if self.waiting else None

    def enqueue(self, seq: Sequence) -> None:
        """A new sequence waits."""
        if not self._by_priority:
            self.waiting.append(seq)
            return
        key = (seq.request.priority, seq.order)
        keys = ((other.request.priority, other.order) for other in self.waiting)
        self.waiting.insert(next((i for i, k in enumerate(keys) if k > key), len(self.waiting)), seq)

    def move(self, seq: Sequence, status: SequenceStatus) -> None:
        """Change the status; a sequence that waits again is the first to do so."""
        match seq.status:
            case SequenceStatus.WAITING:
                self.waiting.remove(seq)
            case SequenceStatus.HELD:
                self.held.remove(seq)
            case SequenceStatus.RUNNING:
                self.running.remove(seq)
        match status:
            case SequenceStatus.WAITING:
                self.waiting.appendleft(seq)
            case SequenceStatus.HELD:
                self.held.append(seq)
            case SequenceStatus.RUNNING:
                bisect.insort(self.running, seq, key=lambda other: other.order)
        seq.status = status
