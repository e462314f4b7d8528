"""A step while it is being decided: slices, block updates and new rows, and the counters that move with them.

Made and filled by ``scheduler`` in one call of ``schedule``; becomes an immutable ``StepPlan`` at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.engine.kv_manager import BlockUpdate
from outrider.engine.sequence import Sequence
from outrider.types import RowInit, SeqSlice, StepPlan


@dataclass(slots=True)
class Plan:
    """A step plan, the sequences behind its slices in the same order, and those that take a row in it."""

    step: StepPlan
    sequences: list[Sequence]
    started: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class PlanDraft:
    """What has been planned so far."""

    sequences: list[Sequence] = field(default_factory=list)
    slices: list[SeqSlice] = field(default_factory=list)
    updates: list[BlockUpdate] = field(default_factory=list)
    new_rows: list[RowInit] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(piece.num_tokens for piece in self.slices)

    def start_row(self, seq: Sequence) -> None:
        """The sequence takes its device row in this step; penalties and prompt logprobs need its tokens there."""
        sampling = seq.request.sampling
        needs_tokens = sampling.uses_history or sampling.prompt_logprobs is not None
        tokens = list(seq.token_ids) if needs_tokens else []
        self.started.append(seq)
        self.new_rows.append(RowInit(seq.row, sampling, seq.prompt_len, tokens, seq.request.images))

    def add(self, seq: Sequence, count: int) -> None:
        """Compute the next ``count`` tokens of the sequence; from here on it is in flight."""
        start, end, length = seq.num_computed, seq.num_computed + count, seq.length
        from_device = end > len(seq.token_ids)
        samples = end == length
        self.slices.append(
            SeqSlice(
                seq.row,
                start,
                count,
                [] if from_device else seq.token_ids[start:end],
                from_device,
                samples,
                length - seq.prompt_len,
            )
        )
        self.sequences.append(seq)
        seq.num_computed = end
        seq.in_flight += 1
        seq.num_pending += samples

    def build(self, step_id: int) -> Plan:
        """The finished step, single tokens first, with the grammar masks of the rows that sample."""
        order = sorted(range(len(self.slices)), key=lambda i: self.slices[i].num_tokens > 1)
        self.slices = [self.slices[i] for i in order]
        self.sequences = [self.sequences[i] for i in order]
        masks = {
            piece.row: seq.grammar.mask()
            for seq, piece in zip(self.sequences, self.slices, strict=True)
            if seq.grammar is not None and piece.samples
        }
        step = StepPlan(step_id, self.slices, self.new_rows, self.updates, masks)
        return Plan(step, self.sequences, self.started)
