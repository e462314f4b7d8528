"""Host-side state of the device rows, and the arithmetic that turns slices into index arrays.

A *row* is a running sequence's fixed place: its line in the block tables, its sampling parameters, its slot for
the last sampled id. Called by ``model_runner``; numpy only, no torch, no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.kv_layout import KVLayout
from outrider.types import RowInit, SamplingParams, SeqSlice, StepPlan

IntArray = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step as numpy arrays; names and shapes as in ``batch.Batch`` (int64 unless said)."""

    token_ids: IntArray  # [T]; 0 where the id is still on the device
    positions: IntArray  # [T]
    slots: IntArray  # [G, T]
    rows: IntArray  # [S]
    query_start: NDArray[np.int32]  # [S + 1]
    seq_lens: NDArray[np.int32]  # [S]
    block_tables: NDArray[np.int32]  # [G, S, B]
    device_tokens: IntArray  # indices into [T] whose id comes from the device
    device_rows: IntArray  # the rows they come from
    sample_seqs: IntArray  # [N] indices into [S] of the sequences to sample from
    sample_rows: IntArray  # [N]
    output_index: IntArray  # [N]
    num_decodes: int
    max_query_len: int
    max_seq_len: int

    @property
    def last_tokens(self) -> IntArray:
        """[S] indices into [T] of each sequence's last token; 0 where there is none yet."""
        return np.maximum(self.query_start[1:].astype(np.int64) - 1, 0)

    def model_inputs(self) -> list[np.ndarray]:
        """What the model reads: ids, positions, slots, query starts, lengths, block tables, last tokens."""
        return [
            self.token_ids,
            self.positions,
            self.slots,
            self.query_start,
            self.seq_lens,
            self.block_tables,
            self.last_tokens,
        ]


class RowTable:
    """Block tables ``[G, R, B]`` and sampling parameters of ``num_rows`` rows."""

    def __init__(self, layout: KVLayout, num_rows: int, max_model_len: int) -> None:
        self.layout = layout
        self.max_blocks = -(-max_model_len // layout.block_size)
        self.tables = np.zeros((len(layout.groups), num_rows, self.max_blocks), dtype=np.int32)
        self.params: list[SamplingParams | None] = [None] * num_rows
        self.inits: list[RowInit | None] = [None] * num_rows
        self.temperature = np.zeros(num_rows, dtype=np.float32)
        self.top_p = np.ones(num_rows, dtype=np.float32)
        self.top_k = np.zeros(num_rows, dtype=np.int32)
        self.min_p = np.zeros(num_rows, dtype=np.float32)
        self.seed = np.zeros(num_rows, dtype=np.uint64)

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's new rows, then its block-table writes."""
        for init in plan.new_rows:
            self._start(init)
        for group, row, index, block_id in plan.block_updates:
            self.tables[group, row, index] = block_id

    def _start(self, init: RowInit) -> None:
        row, params = init.row, init.sampling
        self.tables[:, row, :] = 0
        self.params[row] = params
        self.inits[row] = init
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.top_k[row] = params.top_k
        self.min_p[row] = params.min_p
        self.seed[row] = params.seed & 0xFFFFFFFFFFFFFFFF

    def arrays(self, slices: list[SeqSlice]) -> StepArrays:
        """The index arrays of a step."""
        counts = np.array([s.num_tokens for s in slices], dtype=np.int64)
        starts = np.array([s.start for s in slices], dtype=np.int64)
        rows = np.array([s.row for s in slices], dtype=np.int64)
        query_start = np.zeros(len(slices) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        positions = np.arange(num_tokens) + np.repeat(starts - query_start[:-1], counts)
        token_rows = np.repeat(rows, counts)
        size = self.layout.block_size
        blocks = self.tables[:, token_rows, positions // size].astype(np.int64)
        seq_lens = (starts + counts).astype(np.int32)
        max_seq_len = int(seq_lens.max())
        width = -(-max_seq_len // size)
        samples = np.array([s.samples for s in slices], dtype=bool)
        device = np.array([s.from_device for s in slices], dtype=bool)
        last = query_start[1:].astype(np.int64) - 1
        num_prefills = int((counts > 1).sum())
        num_decodes = len(slices) if not num_prefills else int(np.argmax(counts > 1))
        return StepArrays(
            token_ids=_concat_ids(slices, query_start),
            positions=positions,
            slots=blocks * size + positions % size,
            rows=rows,
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=self.tables[:, rows, :width],
            device_tokens=last[device],
            device_rows=rows[device],
            sample_seqs=np.flatnonzero(samples),
            sample_rows=rows[samples],
            output_index=np.array([s.output_index for s in slices], dtype=np.int64)[samples],
            num_decodes=num_decodes,
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
        )

    def sampling_arrays(self, rows: IntArray, output_index: IntArray) -> list[np.ndarray]:
        """``temperature, top_p, top_k, min_p, uniform`` of the rows that sample, each ``[N]``."""
        uniform = self.uniforms(rows, output_index)
        return [self.temperature[rows], self.top_p[rows], self.top_k[rows], self.min_p[rows], uniform]

    def uniforms(self, rows: IntArray, output_index: IntArray) -> NDArray[np.float32]:
        """One number in (0, 1) per sampled token, a pure function of the request's seed and the token's index.

        So a draw never depends on the batch, the step or the device. The seed is mixed before the index is added,
        or neighbouring seeds would draw the same numbers one token apart.
        """
        x = _mix(_mix(self.seed[rows]) + output_index.astype(np.uint64))
        # 23 bits and a half step: never 0, never rounded up to 1 in float32.
        uniform: NDArray[np.float32] = (((x >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23).astype(
            np.float32
        )
        return uniform


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), one step on."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _concat_ids(slices: list[SeqSlice], query_start: NDArray[np.int32]) -> IntArray:
    """The ids that the plan carries, each slice's behind the other's; 0 for those that only the device knows."""
    out = np.zeros(int(query_start[-1]), dtype=np.int64)
    for piece, start in zip(slices, query_start.tolist(), strict=False):
        if not piece.from_device:
            assert len(piece.token_ids) == piece.num_tokens, "a slice's ids do not match its length"
            out[start : start + piece.num_tokens] = piece.token_ids
    return out
