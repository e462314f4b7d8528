"""Full CUDA graphs of decode steps: captured per batch size, replayed for any step that only decodes.

Called by ``model_runner``. A graph holds the whole forward pass of a rank, chunked-attention layers included;
its inputs are static buffers that a step's batch is copied into. A step of S sequences replays the smallest
captured size that holds it; the rows beyond S have length 0 and write into the null block.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from outrider.models.decoder import Decoder
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.kv_cache import KVCache

START_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Captured before the server is ready; the sizes between are captured when first met."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Every size a graph may have: fine steps where padding would cost most, 16 apart beyond 32."""
    sizes = [*range(1, 9), *range(12, 33, 4), *range(48, max_num_seqs + 1, 16)]
    return sorted({s for s in sizes if s < max_num_seqs} | {max_num_seqs})


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


class DecodeGraphs:
    """Static input buffers for ``max_num_seqs`` rows and the graphs that read their beginnings."""

    def __init__(
        self, model: Decoder, kv: KVCache, *, max_num_seqs: int, max_model_len: int, device: torch.device
    ) -> None:
        layout = kv.layout
        num_groups, self._width = len(layout.groups), -(-max_model_len // layout.block_size)
        self._model, self._kv = model, kv
        self._max_model_len = max_model_len
        self._sizes = graph_sizes(max_num_seqs)
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        n = max_num_seqs
        self._token_ids = torch.zeros(n, dtype=torch.int64, device=device)
        self._positions = torch.zeros(n, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(n, dtype=torch.int32, device=device)
        self._query_start = torch.arange(n + 1, dtype=torch.int32, device=device)
        # One buffer per size, because a slice of [G, N] along N would not be contiguous.
        self._num_groups, self._device = num_groups, device
        self._slots: dict[int, torch.Tensor] = {}
        self._tables = torch.zeros((num_groups, n, self._width), dtype=torch.int32, device=device)

    def covers(self, batch: Batch) -> bool:
        """Whether the step is decodes only, and few enough."""
        num_seqs = len(batch.attention.seq_lens)
        return (
            batch.attention.num_decodes == num_seqs and num_seqs <= self._sizes[-1] and batch.images is None
        )

    def capture_start_sizes(self) -> None:
        """Capture the usual sizes, the largest first so that the others fit into its memory."""
        for size in sorted({s for s in START_SIZES if s in self._sizes} | {self._sizes[-1]}, reverse=True):
            self._capture(size)

    def replay(self, batch: Batch) -> torch.Tensor:
        """Hidden states ``[S, M]`` of the step (valid until the next replay)."""
        num_seqs = len(batch.token_ids)
        size = self._sizes[bisect.bisect_left(self._sizes, num_seqs)]
        if size not in self._captured:
            self._capture(size)
        attention = batch.attention
        self._token_ids[:num_seqs].copy_(batch.token_ids)
        self._positions[:num_seqs].copy_(batch.positions)
        self._seq_lens[:num_seqs].copy_(attention.seq_lens)
        self._seq_lens[num_seqs:size].zero_()
        self._slots[size][:, :num_seqs].copy_(attention.slots)
        self._slots[size][:, num_seqs:].zero_()
        self._tables[:, :num_seqs, : attention.block_tables.shape[2]].copy_(attention.block_tables)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.output[:num_seqs]

    def _static_batch(self, size: int) -> Batch:
        if size not in self._slots:
            self._slots[size] = torch.zeros((self._num_groups, size), dtype=torch.int64, device=self._device)
        attention = AttentionBatch(
            query_start=self._query_start[: size + 1],
            seq_lens=self._seq_lens[:size],
            block_tables=self._tables[:, :size],
            slots=self._slots[size],
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self._max_model_len,
        )
        return Batch(self._token_ids[:size], self._positions[:size], attention)

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        batch = self._static_batch(size)
        # Empty rows: the capture's own run must read nothing and write only into the null block.
        self._seq_lens[:size].zero_()
        self._slots[size].zero_()
        self._model.forward(batch, self._kv, None)  # compiles kernels outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._model.forward(batch, self._kv, None)
        self._captured[size] = _Captured(graph, output)
