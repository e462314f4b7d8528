"""Steps of many sizes poured into few shapes, so that a CUDA graph per shape serves them all.

Called by ``model_runner`` and ``graphs``; numpy only. A padded step lays its rows out as

    [ decodes | padding | prompt tokens | padding ]        tokens  [decodes + prefill_tokens]
    [ decodes | padding | prefills      | padding ]        sequences [decodes + prefill_seqs]

Padding rows have length 0 and slot 0 (the null block): they are computed and never read. Their tokens differ, so that
no single expert gets them all.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass

import numpy as np

from outrider.engine.starts import wave_share
from outrider.runner.rows import StepArrays

PREFILL_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Prompt tokens of a shape; longer prefills are bound by the device anyway and run without a graph.

Not tuned one by one. H200, 2026-11-23: a step of 100 decodes and 512 prompt tokens took the host 80 ms to launch, 45.6
with a graph (the device 44); 2026-11-26: one of 2,048, then without a graph, 115 to 125, its kernels 90 (docs/log.md).
"""

PREFILL_SEQS = 16
"""Prompts of a shape. Not tuned."""

PADDING_IDS = 64
"""Padding takes the first token ids, which every vocabulary has. Not tuned."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rows of a padded step: one-token sequences, prompt tokens, and sequences that these belong to."""

    decodes: int
    prefill_tokens: int
    prefill_seqs: int

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden states."""
        return self.decodes + self.prefill_tokens

    @property
    def num_seqs(self) -> int:
        """Rows of the block tables."""
        return self.decodes + self.prefill_seqs


class ShapeTable:
    """Which shapes exist for a server of ``max_num_seqs`` with ``prefill_share`` prompt tokens beside decodes."""

    def __init__(self, max_num_seqs: int, prefill_share: int) -> None:
        fine = [*range(1, 9), 12, 16, 24, 32, 48, *range(64, max_num_seqs + 1, 32)]
        self.decodes = sorted({s for s in fine if s < max_num_seqs} | {max_num_seqs})
        # Beside a prompt a few rows more cost little, and every shape is a graph.
        mixed = [8, 16, *range(32, 257, 32), *range(320, max_num_seqs, 64)]
        self._mixed = sorted({s for s in mixed if s < max_num_seqs} | {max_num_seqs})
        most = PREFILL_TOKENS[-1]
        self._share = _at_least(PREFILL_TOKENS, min(prefill_share, most))
        # A last wave's prompt tokens: room for all that ride beside the fewest decodes that a shape serves.
        fewest = [1, *(size + 1 for size in self._mixed[:-1])]
        self._wave = {
            size: max(self._share, min(most, wave_share(prefill_share, few)))
            for size, few in zip(self._mixed, fewest, strict=True)
        }

    @property
    def largest(self) -> StepShape:
        """A shape that no other exceeds in any number."""
        return StepShape(self.decodes[-1], PREFILL_TOKENS[-1], PREFILL_SEQS)

    def shape_of(self, arrays: StepArrays) -> StepShape | None:
        """A shape that holds the step, or None; a last wave's takes whatever is more than a share beside decodes."""
        num_decodes = arrays.num_decodes
        num_prefills = len(arrays.rows) - num_decodes
        num_tokens = len(arrays.token_ids) - num_decodes
        if not num_prefills:
            return StepShape(_at_least(self.decodes, num_decodes), 0, 0)
        if num_prefills > PREFILL_SEQS or num_tokens > PREFILL_TOKENS[-1]:
            return None
        if not num_decodes:
            return StepShape(0, _at_least(PREFILL_TOKENS, num_tokens), PREFILL_SEQS)
        decodes = _at_least(self._mixed, num_decodes)
        if self._share < num_tokens <= self._wave[decodes]:
            return StepShape(decodes, self._wave[decodes], PREFILL_SEQS)
        return StepShape(decodes, _at_least(PREFILL_TOKENS, num_tokens), PREFILL_SEQS)

    def start_shapes(self) -> list[StepShape]:
        """The shapes that a server meets at once: all decode sizes, prompts alone, and mixed steps.

        Beside decodes these are a prompt's short rest, a share, and the shares of a last wave. The others are captured
        when they are first met, which delays that one step by about a fifth of a second.
        """
        shapes = [StepShape(s, 0, 0) for s in self.decodes]
        shapes += [StepShape(0, tokens, PREFILL_SEQS) for tokens in (64, 256, 1024, 1536, 2048)]
        for decodes in self._mixed:
            mixed = {PREFILL_TOKENS[0], self._share, self._wave[decodes]}
            shapes += [StepShape(decodes, tokens, PREFILL_SEQS) for tokens in sorted(mixed)]
        return shapes


def _at_least(sizes: tuple[int, ...] | list[int], size: int) -> int:
    return sizes[bisect.bisect_left(sizes, size)]


def pad(arrays: StepArrays, shape: StepShape, num_blocks: int, max_seq_len: int) -> StepArrays:
    """The step laid out as ``shape``, block tables ``num_blocks`` wide; index arrays point at the new places."""
    num_decodes, num_tokens, num_seqs = arrays.num_decodes, len(arrays.token_ids), len(arrays.rows)
    shift = shape.decodes - num_decodes

    def spread(values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Decodes stay at the front of the last axis, prefills move behind the padding."""
        count = values.shape[-1]
        out[..., :num_decodes] = values[..., :num_decodes]
        out[..., shape.decodes : count + shift] = values[..., num_decodes:]
        return out

    def tokens(values: np.ndarray) -> np.ndarray:
        return spread(values, np.zeros((*values.shape[:-1], shape.num_tokens), dtype=values.dtype))

    padding_ids = np.arange(shape.num_tokens, dtype=arrays.token_ids.dtype) % PADDING_IDS

    def moved(indices: np.ndarray) -> np.ndarray:
        return np.where(indices < num_decodes, indices, indices + shift)

    query_start = np.arange(shape.num_seqs + 1, dtype=np.int32)
    query_start[shape.decodes :] = shape.decodes + num_tokens - num_decodes
    query_start[shape.decodes : num_seqs + shift] = arrays.query_start[num_decodes:-1] + shift
    seq_lens = spread(arrays.seq_lens, np.zeros(shape.num_seqs, dtype=np.int32))
    tables = np.zeros((arrays.block_tables.shape[0], shape.num_seqs, num_blocks), dtype=np.int32)
    width = arrays.block_tables.shape[2]
    tables[:, :num_decodes, :width] = arrays.block_tables[:, :num_decodes]
    tables[:, shape.decodes : num_seqs + shift, :width] = arrays.block_tables[:, num_decodes:]
    return dataclasses.replace(
        arrays,
        token_ids=spread(arrays.token_ids, padding_ids),
        positions=tokens(arrays.positions),
        slots=tokens(arrays.slots),
        query_start=query_start,
        seq_lens=seq_lens,
        block_tables=tables,
        device_tokens=moved(arrays.device_tokens),
        sample_seqs=moved(arrays.sample_seqs),
        num_decodes=shape.decodes,
        max_query_len=max(1, shape.prefill_tokens),
        max_seq_len=max_seq_len,
    )
