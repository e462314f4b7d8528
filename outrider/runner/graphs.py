"""Full CUDA graphs of whole steps: captured per shape, replayed for every step that fits it.

Called by ``model_runner``. A graph holds a rank's forward pass, chunked-attention layers and mixed batches included;
it reads a static buffer, into which a step's arrays are copied just before. All shapes share that memory, since steps
follow one another on one stream: block tables of 512 rows take 17 MB at 131,072 tokens of context. The usual shapes
are captured before the server is ready, the others when they are first met.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from outrider.models.decoder import Decoder
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.kv_cache import KVCache
from outrider.runner.padding import ShapeTable, StepShape, pad
from outrider.runner.rows import StepArrays
from outrider.runner.staging import Staging


@dataclass(slots=True)
class _Captured:
    """A shape's static input within the shared buffer, and the graph with its output."""

    buffer: torch.Tensor
    batch: Batch
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


class StepGraphs:
    """The graphs of one model and cache."""

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        prefill_share: int,
        device: torch.device,
    ) -> None:
        self._model, self._kv, self._device = model, kv, device
        self._max_model_len = max_model_len
        self._num_blocks = -(-max_model_len // kv.layout.block_size)
        self._shapes = ShapeTable(max_num_seqs, prefill_share)
        self._staging = Staging(device)
        self._captured: dict[StepShape, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs, _ = self._staging.allocate(self._empty_step(self._shapes.largest).model_inputs())

    def shape_of(self, arrays: StepArrays) -> StepShape | None:
        """The shape whose graph can run this step, or None."""
        return self._shapes.shape_of(arrays)

    def pad(self, arrays: StepArrays, shape: StepShape) -> StepArrays:
        """The step laid out as ``shape``."""
        return pad(arrays, shape, self._num_blocks, self._max_model_len)

    def load(self, arrays: StepArrays, shape: StepShape) -> Batch:
        """Copy a padded step into its shape's static buffer; the batch reads that buffer."""
        captured = self._captured.get(shape) or self._capture(shape)
        self._staging.upload(arrays.model_inputs(), captured.buffer)
        return captured.batch

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Hidden states ``[num_seqs, M]`` of the last tokens; valid until the next replay of any shape."""
        captured = self._captured[shape]
        captured.graph.replay()
        return captured.output

    def capture_start_shapes(self) -> None:
        """Capture the usual shapes, the largest first so that the others fit into its memory."""
        for shape in self._start_shapes():
            self._capture(shape)

    @torch.inference_mode()
    def run_start_shapes(self) -> None:
        """A forward pass of each usual shape, without a graph: what it computes is not kept."""
        for shape in self._start_shapes():
            self._model.forward(self._empty_batch(shape)[1], self._kv)

    def _start_shapes(self) -> list[StepShape]:
        return sorted(self._shapes.start_shapes(), key=lambda s: -s.num_tokens)

    def _empty_step(self, shape: StepShape) -> StepArrays:
        """A step of padding only: it reads nothing and writes only into the null block."""
        none = np.zeros(0, dtype=np.int64)
        num_groups = len(self._kv.layout.groups)
        arrays = StepArrays(
            token_ids=none,
            positions=none,
            slots=np.zeros((num_groups, 0), dtype=np.int64),
            rows=none,
            query_start=np.zeros(1, dtype=np.int32),
            seq_lens=np.zeros(0, dtype=np.int32),
            block_tables=np.zeros((num_groups, 0, self._num_blocks), dtype=np.int32),
            device_tokens=none,
            device_rows=none,
            sample_seqs=none,
            sample_rows=none,
            output_index=none,
            num_decodes=0,
            max_query_len=0,
            max_seq_len=0,
        )
        return self.pad(arrays, shape)

    def _empty_batch(self, shape: StepShape) -> tuple[torch.Tensor, Batch]:
        """The static buffer of a shape, and the batch that reads it; filled with padding."""
        arrays = self._empty_step(shape)
        buffer, tensors = self._staging.allocate(arrays.model_inputs(), within=self._inputs)
        self._staging.upload(arrays.model_inputs(), buffer)
        token_ids, positions, slots, query_start, seq_lens, block_tables, last_tokens = tensors
        attention = AttentionBatch(
            query_start=query_start,
            seq_lens=seq_lens,
            block_tables=block_tables,
            slots=slots,
            num_decodes=arrays.num_decodes,
            max_query_len=arrays.max_query_len,
            max_seq_len=arrays.max_seq_len,
        )
        # Where every token is its sequence's last there is nothing to leave out.
        output_rows = last_tokens if shape.prefill_tokens else None
        return buffer, Batch(token_ids, positions, attention, output_rows=output_rows)

    @torch.inference_mode()
    def _capture(self, shape: StepShape) -> _Captured:
        buffer, batch = self._empty_batch(shape)
        with self._model.shortened():
            self._model.forward(batch, self._kv)  # compiles and loads kernels outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._model.forward(batch, self._kv)
        captured = self._captured[shape] = _Captured(buffer, batch, graph, output)
        return captured
