"""Who computes which tokens in the next step. Called by ``engine``; no torch, no clock, no text.

``schedule`` turns the state into a ``StepPlan``; ``commit`` takes what the step produced. Between the two a
sequence is *in flight*: whatever happens to it then (abort, end, error) only marks it, and its blocks and row
go back in one place, ``_release``, when nothing on the device can still write to them.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outrider.engine.kv_manager import KVManager
from outrider.engine.plan import Plan, PlanDraft
from outrider.engine.queues import Queues
from outrider.engine.sequence import Sequence, SequenceStatus
from outrider.engine.starts import Starts
from outrider.types import (
    FINISH_ABORT,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    STEP_TOKEN_BUCKETS,
    EngineStats,
    Request,
    SeqSlice,
    StepResult,
    TokenEvent,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from outrider.engine.grammar import Grammar

logger = logging.getLogger("outrider.engine")

FAILED = "The engine failed on this request; the server's log says why."
NOT_FINITE = "The model produced values that are not finite for this request; try a different prompt."
TOO_LARGE = (
    "This request needs more KV cache than the server has ({needed} of {capacity} blocks); "
    "shorten the prompt or lower max_tokens."
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step.

    ``prefill_share_tokens``: prompt tokens in a step that also decodes. ``one_plan_per_sequence``: a sequence
    waits for its commit before it is planned again (pipeline stages, where the next id is born on the last one).
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_share_tokens: int
    priority: bool = False
    one_plan_per_sequence: bool = False


class Scheduler:
    """Policy and state of the queue: ``add``, ``abort``, ``schedule``, ``commit``."""

    def __init__(self, kv: KVManager, limits: Limits) -> None:
        self.kv = kv
        self.limits = limits
        self.stats = EngineStats(
            kv_blocks_total=kv.pool.capacity, step_token_counts=[0] * (len(STEP_TOKEN_BUCKETS) + 1)
        )
        self.starts = Starts(kv, limits.prefill_share_tokens, limits.max_num_seqs)
        self._queues = Queues(by_priority=limits.priority)
        self._by_id: dict[str, Sequence] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self._step_id = 0

    # -- the outside ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting, running or still in flight."""
        return bool(self._by_id)

    def add(self, request: Request, grammar: Grammar | None = None) -> TokenEvent | None:
        """Queue a request (with its compiled grammar); an event comes back only if it can never run here."""
        needed = self.kv.num_blocks_for(len(request.prompt_token_ids) + request.sampling.max_tokens)
        if needed > self.kv.pool.capacity:
            text = TOO_LARGE.format(needed=needed, capacity=self.kv.pool.capacity)
            return TokenEvent(request.request_id, [], FINISH_ERROR, error=text)
        seq = Sequence(request, self._num_added, len(self.kv.layout.groups), grammar=grammar)
        self._num_added += 1
        self._by_id[request.request_id] = seq
        self.starts.came(seq)
        self._queues.enqueue(seq)
        return None

    def abort(
        self, request_id: str, reason: str = FINISH_ABORT, error: str | None = None
    ) -> TokenEvent | None:
        """End a request now; its blocks follow when nothing of it is in flight. None if it is not live."""
        seq = self._by_id.get(request_id)
        if seq is None or seq.status is SequenceStatus.FINISHED:
            return None
        self._finish(seq, reason)
        if seq.in_flight == 0:
            self._release(seq)
        return TokenEvent(request_id, [], reason, error=error)

    # -- schedule ------------------------------------------------------------------------------------

    def schedule(self) -> Plan | None:
        """The next step, or None when nothing can be computed right now."""
        draft = PlanDraft()
        decoding: list[Sequence] = []
        others: list[Sequence] = []
        for seq in self._queues.running:
            (decoding if seq.is_decoding else others).append(seq)
        self._plan_decodes(draft, decoding)
        budget = self.limits.max_num_batched_tokens - len(draft.slices)
        if draft.slices:
            budget = min(budget, self.starts.share_beside(len(draft.slices)))
        budget = self._plan_prefills(draft, others, budget)
        budget = self._start_next(draft, budget)
        budget = self._plan_prefills(draft, list(self._queues.held), budget)
        if not self.limits.priority:  # one that comes later may go first
            self._hold_next(draft, budget)
        if not draft.slices:
            return None
        self._count_step(draft.num_tokens)
        self._step_id += 1
        return draft.build(self._step_id)

    def _count_step(self, num_tokens: int) -> None:
        self.stats.step_tokens = num_tokens
        self.stats.step_tokens_sum += num_tokens
        self.stats.step_token_counts[bisect.bisect_left(STEP_TOKEN_BUCKETS, num_tokens)] += 1

    def _plan_decodes(self, draft: PlanDraft, decoding: list[Sequence]) -> None:
        """One token for every sequence that has one to compute, oldest first; some may be preempted on the way."""
        for seq in decoding:
            if seq.status is not SequenceStatus.RUNNING or not self._can_plan(seq):
                continue
            if self._extend_or_preempt(seq, seq.num_computed + 1, draft):
                draft.add(seq, 1)

    def _plan_prefills(self, draft: PlanDraft, prefilling: list[Sequence], budget: int) -> int:
        """The next chunk of every prompt that has a row, oldest first; returns the budget that is left."""
        for seq in prefilling:
            if budget <= 0:
                break
            if seq.row < 0 or not self._can_plan(seq):  # without a row: preempted on the way
                continue
            count = self._slice_len(seq, budget, seq.status)
            if count and self._extend_or_preempt(seq, seq.num_computed + count, draft):
                draft.add(seq, count)
                budget -= count
        return budget

    def _start_next(self, draft: PlanDraft, budget: int) -> int:
        """Start sequences, in order, while rows, tokens, expected blocks and the pace allow; returns what is left."""
        self.starts.next_step()
        while budget > 0 and (seq := self._queues.next_up) is not None:
            is_held = seq.status is SequenceStatus.HELD
            if not (is_held or self._free_rows) or not self.starts.may_start(seq, self._queues):
                break
            if is_held:
                self._queues.move(seq, SequenceStatus.RUNNING)
                left = self._plan_prefills(draft, [seq], budget)
            else:
                left = self._take_row(seq, SequenceStatus.RUNNING, draft, budget)
                if left == budget:
                    break
            self.starts.started(seq)
            budget = left
        return budget

    def _hold_next(self, draft: PlanDraft, budget: int) -> None:
        """Compute prompts ahead of their turn, in order, where others leave tokens and blocks for that."""
        waiting = self._queues.waiting
        while budget > 0 and waiting and self._free_rows and self.starts.may_hold(waiting[0], self._queues):
            left = self._take_row(waiting[0], SequenceStatus.HELD, draft, budget)
            if left == budget:
                break
            budget = left

    def _take_row(self, seq: Sequence, status: SequenceStatus, draft: PlanDraft, budget: int) -> int:
        """Give one that waits a row, its first blocks and ``status``; returns the budget that is left.

        All of it, and nothing changed, where blocks are missing because the estimate was too low for those running, or
        where there is nothing to compute yet.
        """
        if seq.in_flight:
            return budget
        seq.num_computed = self.kv.match_prefix(seq)
        count = self._slice_len(seq, budget, status)
        seq.row = self._free_rows[-1]
        updates = self.kv.try_extend(seq, seq.num_computed + count) if count else None
        if updates is None:
            self.kv.release(seq)
            seq.num_computed, seq.row = 0, -1
            return budget
        self._free_rows.pop()
        self._queues.move(seq, status)
        if seq.num_outputs == 0:
            seq.num_cached = seq.num_computed
            self.stats.prefix_query_tokens += seq.prompt_len
            self.stats.cached_prompt_tokens += seq.num_cached
        draft.updates.extend(self.kv.table_updates(seq))
        draft.start_row(seq)
        draft.add(seq, count)
        return budget - count

    def _can_plan(self, seq: Sequence) -> bool:
        """Whether the next slice can be decided without the tokens that are still in flight."""
        length = seq.length
        if length >= seq.max_len or length == seq.num_computed:
            return False  # enough tokens are on their way, or every known one is computed
        if self.limits.one_plan_per_sequence and seq.num_pending:
            return False
        if seq.grammar is not None and (seq.num_pending or not seq.grammar.is_ready):
            return False  # the mask of the next token depends on the unread one, or is still being computed
        # A new chunk waits for the old one's commit, so that a sequence never holds two chunks.
        return not (seq.in_flight and self.kv.begins_chunk(seq.num_computed))

    def _slice_len(self, seq: Sequence, budget: int, status: SequenceStatus) -> int:
        """Tokens of the next slice of a sequence with this status; a held one keeps the last for its turn."""
        end = self.kv.chunk_end(seq.num_computed)
        count = min(seq.remaining - (status is SequenceStatus.HELD), budget)
        return count if end is None else min(count, end - seq.num_computed)

    def _extend_or_preempt(self, seq: Sequence, num_tokens: int, draft: PlanDraft) -> bool:
        """Blocks for the slice, taken from the youngest sequences if none are left; False if ``seq`` gave way."""
        while True:
            updates = self.kv.try_extend(seq, num_tokens)
            if updates is not None:
                draft.updates.extend(updates)
                return True
            planned = {id(other) for other in draft.sequences}
            started = [*self._queues.running, *self._queues.held]
            victim = next(s for s in reversed(started) if s is seq or id(s) not in planned)
            self._preempt(victim)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence) -> None:
        """Give blocks and row back and queue again at the front; what was sampled is kept.

        A token in flight is still appended at commit. The next plan may reuse the blocks at once: on the
        device it runs after the step that still reads them.
        """
        self.stats.preemptions += 1
        if seq.status is SequenceStatus.HELD:
            self.starts.gave_way()
        self._give_back(seq)
        seq.num_computed = 0
        self._queues.move(seq, SequenceStatus.WAITING)

    # -- commit --------------------------------------------------------------------------------------

    def commit(self, plan: Plan, result: StepResult) -> list[TokenEvent]:
        """Take a step's outcome: append tokens, end sequences, publish and release blocks."""
        events: list[TokenEvent] = []
        sampled: Iterable[tuple[int, TokenLogprobs | None]] = zip(
            result.token_ids, result.logprobs, strict=True
        )
        samples = iter(sampled)
        for index, (seq, piece) in enumerate(zip(plan.sequences, plan.step.slices, strict=True)):
            seq.in_flight -= 1
            self._commit_positions(seq, piece)
            if index in result.prompt_logprobs and seq.num_read == 0:
                # By position: a preempted prompt is computed again, and a slice of the first time may still come in.
                seq.prompt_logprobs[piece.start :] = result.prompt_logprobs[index]
            if piece.samples:
                seq.num_pending -= 1
                try:
                    event = self._commit_token(seq, *next(samples))
                except Exception:  # what a sequence's own state (its grammar) raises ends that sequence alone
                    event = self._commit_failed(seq)
                if event is not None:
                    events.append(event)
            if seq.status is SequenceStatus.FINISHED and seq.in_flight == 0:
                self._release(seq)
        self.stats.steps += 1
        return events

    def fail(self, plan: Plan) -> list[TokenEvent]:
        """A plan that could not be launched: its sequences end, all others go on."""
        events: list[TokenEvent] = []
        for seq, piece in zip(plan.sequences, plan.step.slices, strict=True):
            seq.in_flight -= 1
            seq.num_pending -= piece.samples
            if seq.status is not SequenceStatus.FINISHED:
                events.append(self._fail_one(seq))
            if seq.in_flight == 0:
                self._release(seq)
        return events

    def _fail_one(self, seq: Sequence) -> TokenEvent:
        self._finish(seq, FINISH_ERROR)
        return TokenEvent(seq.request.request_id, [], FINISH_ERROR, error=FAILED)

    def _commit_failed(self, seq: Sequence) -> TokenEvent | None:
        """The exception that is being handled came from one sequence's token: log it and end the sequence."""
        logger.exception("Request %s could not be continued.", seq.request.request_id)
        return None if seq.status is SequenceStatus.FINISHED else self._fail_one(seq)

    def _commit_positions(self, seq: Sequence, piece: SeqSlice) -> None:
        """Positions of the slice are final, unless the sequence lost its blocks meanwhile."""
        if piece.start < seq.prompt_len:
            self.stats.prompt_tokens += min(piece.start + piece.num_tokens, seq.prompt_len) - piece.start
        if seq.status in (SequenceStatus.RUNNING, SequenceStatus.HELD):
            self.kv.commit(seq, piece.start + piece.num_tokens)

    def _commit_token(
        self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> TokenEvent | None:
        if seq.status is SequenceStatus.FINISHED:
            return None  # ended while in flight: the token is dropped
        if token_id < 0:
            self._finish(seq, FINISH_ERROR)
            return TokenEvent(seq.request.request_id, [], FINISH_ERROR, error=NOT_FINITE)
        first = len(seq.token_ids) == seq.prompt_len
        seq.token_ids.append(token_id)
        self.stats.generation_tokens += 1
        reason, stop_reason = self._end_of(seq, token_id)
        if reason is not None:
            self._finish(seq, reason)
        error = seq.grammar.error if seq.grammar is not None and reason == FINISH_ERROR else None
        return TokenEvent(
            seq.request.request_id,
            [token_id],
            reason,
            stop_reason,
            [logprobs] if logprobs is not None else None,
            [None, *seq.prompt_logprobs] if first and seq.prompt_logprobs else None,
            seq.num_cached if first else 0,
            error,
            400 if error else 500,
            seq.queue_s if first else 0.0,
        )

    def _end_of(self, seq: Sequence, token_id: int) -> tuple[str | None, int | None]:
        """``(finish_reason, stop_reason)`` after this token; the primary eos reports no stop reason."""
        sampling = seq.request.sampling
        if seq.grammar is not None:
            seq.grammar.advance(token_id)
            if seq.grammar.error is not None:
                return FINISH_ERROR, None
        if token_id in seq.end_token_ids and seq.num_read > sampling.min_tokens:
            primary = bool(sampling.eos_token_ids) and token_id == sampling.eos_token_ids[0]
            return FINISH_STOP, None if primary and token_id not in sampling.stop_token_ids else token_id
        if seq.grammar is not None and seq.grammar.is_finished:
            return FINISH_STOP, None
        if len(seq.token_ids) >= seq.max_len:
            return FINISH_LENGTH, None
        return None, None

    # -- endings -------------------------------------------------------------------------------------

    def _finish(self, seq: Sequence, reason: str) -> None:
        self._queues.move(seq, SequenceStatus.FINISHED)
        self.starts.ended(seq, by_itself=reason in (FINISH_STOP, FINISH_LENGTH))

    def _release(self, seq: Sequence) -> None:
        """The one place where a finished sequence leaves: blocks, row and name."""
        self._give_back(seq)
        self.starts.left(seq)
        del self._by_id[seq.request.request_id]

    def _give_back(self, seq: Sequence) -> None:
        self.kv.release(seq)
        if seq.row >= 0:
            self._free_rows.append(seq.row)
            seq.row = -1

    def update_stats(self) -> EngineStats:
        """The snapshot that travels with the events."""
        stats = self.stats
        waiting, held = self._queues.waiting, self._queues.held
        stats.num_running = len(self._queues.running)
        stats.num_waiting = len(waiting) + len(held)
        stats.waiting_prompt_tokens = sum(len(s.token_ids) for s in waiting) + sum(s.remaining for s in held)
        stats.kv_blocks_used = self.kv.pool.num_used
        return stats

    def check_integrity(self) -> None:
        """The ledger: every block and every row is where the books say."""
        self.kv.check_integrity(list(self._by_id.values()))
        rows = [s.row for s in self._by_id.values() if s.row >= 0]
        assert sorted(rows + self._free_rows) == list(range(self.limits.max_num_seqs)), "rows do not add up"
