"""When waiting requests start: as early as memory allows, spread over time, or held back and then all at once.

Called by the scheduler, in this order each step: ``next_step``, then ``may_start`` and ``started`` for every request
at the head of the queue, then ``may_hold``. The choice between the last two matters only while requests of like length
are more than fit together, see ADR 9 and 10; all others start as soon as ``admission.fits`` says that they can stay.
While requests are held back, their prompts are computed, all but the last token.
"""

from __future__ import annotations

import math

import numpy as np

from outrider.engine.admission import Holdings, OutputEstimator, fits, steps_until_room
from outrider.engine.kv_manager import KVManager
from outrider.engine.queues import Queues
from outrider.engine.sequence import Sequence, SequenceStatus

QUIET_STEPS = 64
"""The usual patience: two to three seconds of a busy server."""

LOOK_AGAIN_STEPS = 8
"""Steps between two looks at a queue that is not worth a plan yet."""

LAST_WAVE_TOKENS = 1664
"""Decodes and prompt tokens of a step while the last requests start together.

Sixteen experts get 104 rows each: tiles of 128 are well filled, and few experts need a second one. H200, 2026-11-26,
NVFP4, routed experts of a layer: 0.37 us a token at 1,536, 0.41 at 2,048, 0.43 at 2,223.
"""

LAST_WAVE_SHARES = 4
"""A last wave takes no more than so many times the usual share, which bounds how long a stream waits."""

WORTH_WAITING = 0.8
"""A last wave that begins later than this share of the time that even starts take gains too little.

By the cost model FP8 gains 3 % with 0.7 to 1 and nothing with 0.6, NVFP4 10 % with each: benchmarks.policies.
"""


def wave_share(share: int, num_decodes: int) -> int:
    """Prompt tokens beside so many decodes while the last requests are made ready; ``share``: the usual ones."""
    return max(share, min(LAST_WAVE_SHARES * share, LAST_WAVE_TOKENS - num_decodes))


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
        """A request ended with ``area`` left of what it paid.

        Negative: it took more, of steps that are over, and puts the next start off by no more than one start would.
        """
        least = min(self._balance, -self._most)
        self._balance = min(self._most, max(least, self._balance + area))


class Starts:
    """The policy and what it remembers of the live requests.

    ``share``: prompt tokens that usually ride beside decodes. ``max_num_seqs``: rows of a step. ``patience``: steps
    without a new request after which the queue is taken for all there is; once that was wrong, as many as a request
    lives.
    """

    def __init__(self, kv: KVManager, share: int, max_num_seqs: int, patience: float = QUIET_STEPS) -> None:
        self.estimator = OutputEstimator()
        self._kv, self._capacity, self._share = kv, kv.pool.capacity, share
        self._max_num_seqs = max_num_seqs
        self._pacer = Pacer(self._capacity)
        self._demand = 0  # blocks that all live sequences are expected to hold at their ends
        self._patience = self._usual_patience = patience
        self._quiet_steps = 0.0
        self._hold_steps = 0.0
        self._is_last_wave = False
        self._room_to_hold = 0.0  # blocks that those that run leave to prompts of those that are held

    def share_beside(self, num_decodes: int) -> int:
        """Prompt tokens that may ride beside so many decodes in the next step."""
        is_planned = self._is_last_wave or self._room_to_hold > 0
        return wave_share(self._share, num_decodes) if is_planned else self._share

    def came(self, seq: Sequence) -> None:
        """A request was queued."""
        if not self._demand:
            self._patience = self._usual_patience
        elif self._is_last_wave or self._hold_steps > 0 or self._room_to_hold > 0:
            # The queue had not come to its end: requests follow one another, in a closed loop or an open one.
            self._patience = max(self._patience, self.estimator.mean_outputs(seq))
        seq.prompt_blocks = self._kv.num_blocks_for(seq.prompt_len)
        seq.demand = self._kv.num_blocks_for(self.estimator.expected_total(seq))
        self._demand += seq.demand
        self.estimator.follow(seq, 1)
        self._quiet_steps, self._hold_steps, self._is_last_wave, self._room_to_hold = 0, 0, False, 0

    def next_step(self) -> None:
        """Another step is being planned."""
        self._pacer.next_step()
        self._quiet_steps += 1
        self._hold_steps -= 1

    def may_start(self, seq: Sequence, queues: Queues) -> bool:
        """Whether ``seq``, the next one up, starts now: there will be room, and it is its turn."""
        if not queues.running:
            return True
        is_held = seq.status is SequenceStatus.HELD
        if self._is_in_waves(seq):
            if not self._is_its_turn(queues):
                return False
            if self._is_last_wave and is_held:
                return True  # all those held were found to fit
        room = self._capacity - _blocks_of(queues) + is_held * seq.prompt_blocks
        return fits(queues.running, (seq,), self.estimator, self._kv.layout, room)

    def may_hold(self, seq: Sequence, queues: Queues) -> bool:
        """Whether the prompt of ``seq``, the first that waits, is computed ahead of its turn."""
        room = self._room_to_hold - _blocks_of(queues)
        return seq.prompt_blocks <= room and self._is_in_waves(seq)

    def _is_in_waves(self, seq: Sequence) -> bool:
        return self._demand > self._capacity and not seq.paid and self.estimator.is_regular(seq)

    def started(self, seq: Sequence) -> None:
        """A request starts; one that was preempted in its prompt has paid."""
        if not seq.paid:
            seq.paid = self._area(seq, self.estimator.mean_outputs(seq))
            self._pacer.pay(seq.paid)

    def ended(self, seq: Sequence, *, by_itself: bool) -> None:
        """A request ended, ``by_itself`` or because it was told to."""
        if by_itself:
            self.estimator.observe(seq.num_read)
        if seq.paid:
            self._pacer.refund(seq.paid - self._area(seq, seq.num_outputs))
            self._hold_steps = 0  # there is room: look again

    def gave_way(self) -> None:
        """One that was held lost its blocks to those that run, which outgrew their estimates: hold no more for now."""
        self._room_to_hold = 0

    def left(self, seq: Sequence) -> None:
        """A request is gone."""
        self._demand -= seq.demand
        self.estimator.follow(seq, -1)

    def _area(self, seq: Sequence, num_outputs: int) -> int:
        """Blocks that the sequence holds on average, times its steps, if it generates so many tokens."""
        num_steps = num_outputs + seq.prompt_len // self._share
        return self._kv.num_blocks_for(seq.prompt_len + num_outputs // 2) * num_steps

    def _is_its_turn(self, queues: Queues) -> bool:
        if self._quiet_steps < self._patience:
            return self._pacer.may_start
        if self._is_last_wave or self._hold_steps > 0:
            return self._is_last_wave
        return self._begin_or_hold(queues)

    def _begin_or_hold(self, queues: Queues) -> bool:
        """Whether the queue is through sooner when the next one up starts now, if nothing else comes.

        The last ones, as many as fit together at their ends, start together as soon as the others leave room for that;
        those before them start now. One of the last starts alone only if that does not put the others off.
        """
        running, queue = queues.running, [*queues.held, *queues.waiting]
        head, count = queue[0], len(queue)
        num_outputs, total = self.estimator.mean_outputs(head), self.estimator.expected_total(head)
        at_end = self._kv.num_blocks_for(total)
        if self._capacity // at_end > self._max_num_seqs:
            self._room_to_hold = 0  # rows run out before memory does: no end to plan for
            return self._pacer.may_start
        num_first = max(1, count - self._capacity // at_end)
        others = self._holdings(running)
        waste = 0.5 * len(self._kv.layout.local)  # half a block on average; none may be left over

        def wait_of(group: list[Sequence], others: Holdings) -> float:
            """Steps until the group can start together; what is left of its prompts delays it by half of its steps."""
            last = Holdings.of_equals(head.prompt_blocks, at_end, num_outputs, len(group))
            tokens = sum(seq.prompt_len - seq.num_computed - 1 for seq in group)
            steps = tokens / wave_share(self._share, len(running) + len(group) // 2)
            return max(0.0, steps_until_room(others, last, self._capacity, waste) - steps / 2)

        together = wait_of(queue, others)
        if together == 0 and fits(running, queue, self.estimator, self._kv.layout, self._capacity):
            self._is_last_wave, self._room_to_hold = True, 0  # whoever is not held yet starts as it is
            return True
        first = Holdings.of_equals(head.prompt_blocks, at_end, num_outputs, num_first)
        apart = wait_of(queue[num_first:], others + first)
        evenly = count * self._area(head, num_outputs) / self._capacity
        if min(together, apart) > WORTH_WAITING * evenly:
            self._quiet_steps = self._patience - LOOK_AGAIN_STEPS  # a look costs a millisecond
            self._room_to_hold = 0
            return self._pacer.may_start
        in_use = (others + first).at_ends()[1].max()
        self._room_to_hold = self._capacity - in_use - waste * (len(running) + num_first)
        if apart > together:
            self._hold_steps = together // 2  # then look again
            return False
        # Starts at the rate at which ends will make room for what all others then grow; those whose ends nobody needs
        # for that, as where prompts are longer than answers, at the even rate.
        age = max(seq.num_outputs for seq in running)
        self._hold_steps = total * math.log((len(running) + 1 + count) / count) - age
        if num_first * total > self._capacity // at_end * num_outputs:
            self._hold_steps = min(self._hold_steps, evenly / count)
        return True

    def _holdings(self, running: list[Sequence]) -> Holdings:
        blocks_for, expected = self._kv.num_blocks_for, self.estimator.expected_total
        totals = [max(expected(seq), seq.length) for seq in running]
        return Holdings(
            held=np.array([blocks_for(max(seq.length, seq.prompt_len)) for seq in running], dtype=np.float64),
            at_end=np.array([blocks_for(total) for total in totals], dtype=np.float64),
            steps=np.array([total - seq.length + 1 for seq, total in zip(running, totals, strict=True)]),
        )


def _blocks_of(queues: Queues) -> int:
    """Blocks that those held hold or will."""
    return sum(seq.prompt_blocks for seq in queues.held)
