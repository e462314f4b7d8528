"""A model without weights: the next id is a hash of all ids before it, read through the block tables.

Every token's id is stored in the block and offset that the plan gave it, and a step recovers the whole context
from those places alone. A block freed too early, shared wrongly or written twice therefore changes the output.
"""

from __future__ import annotations

import zlib

import numpy as np

from outrider.kv_layout import KVLayout
from outrider.runner.rows import RowTable
from outrider.types import SeqSlice, StepPlan, StepResult, TokenLogprobs


class _Handle:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class FakeExecutor:
    """Executes plans at launch; ``vocab`` ids, ``eos`` never produced unless ``eos_every`` divides the hash."""

    def __init__(
        self, layout: KVLayout, num_blocks: int, num_rows: int, max_model_len: int, vocab: int = 997
    ):
        self.table = RowTable(layout, num_rows, max_model_len)
        self.layout = layout
        self.vocab = vocab
        self.memory = np.full((len(layout.groups), num_blocks * layout.block_size), -1, dtype=np.int64)
        self.last_ids = np.zeros(num_rows, dtype=np.int64)
        self.max_step_tokens = 0

    def launch(self, plan: StepPlan) -> _Handle:
        self.table.apply(plan)
        arrays = self.table.arrays(plan.slices)
        ids = arrays.token_ids.copy()
        ids[arrays.device_tokens] = self.last_ids[arrays.device_rows]
        assert (arrays.slots >= self.layout.block_size).all(), "a token would be written into the null block"
        for group in range(len(self.layout.groups)):
            self.memory[group, arrays.slots[group]] = ids
        self.max_step_tokens = max(self.max_step_tokens, len(ids))
        out = [
            self._next(piece.row, piece.start + piece.num_tokens) for piece in plan.slices if piece.samples
        ]
        self.last_ids[arrays.sample_rows] = out
        about = {
            i: entries for i, piece in enumerate(plan.slices) if (entries := self._prompt_logprobs(piece))
        }
        return _Handle(StepResult(plan.step_id, out, [None] * len(out), about))

    def _prompt_logprobs(self, piece: SeqSlice) -> list[TokenLogprobs]:
        """An entry for each prompt token behind those of the slice, if they were asked for."""
        init = self.table.inits[piece.row]
        if init is None or init.sampling.prompt_logprobs is None:
            return []
        targets = init.token_ids[piece.start + 1 : min(piece.start + piece.num_tokens + 1, init.prompt_len)]
        return [TokenLogprobs(token_id, 0.0, 1, [], []) for token_id in targets]

    def _next(self, row: int, length: int) -> int:
        size = self.layout.block_size
        digest = 0
        for group, is_local in enumerate(self.layout.local):
            chunk = self.layout.chunk_size
            first = (length - 1) // chunk * chunk if is_local and chunk else 0
            positions = np.arange(first, length)
            slots = (
                self.table.tables[group, row, positions // size].astype(np.int64) * size + positions % size
            )
            digest = zlib.crc32(self.memory[group, slots].tobytes(), digest)
        return digest % self.vocab

    def shutdown(self) -> None:
        pass


def expected_ids(prompt: list[int], count: int, layout: KVLayout, vocab: int = 997) -> list[int]:
    """The same function computed from the ids themselves, with no blocks at all."""
    ids = list(prompt)
    for _ in range(count):
        digest = 0
        for is_local in layout.local:
            chunk = layout.chunk_size
            first = (len(ids) - 1) // chunk * chunk if is_local and chunk else 0
            digest = zlib.crc32(np.array(ids[first:], dtype=np.int64).tobytes(), digest)
        ids.append(digest % vocab)
    return ids[len(prompt) :]
