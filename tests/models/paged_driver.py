"""The smallest runner: builds a ``Batch`` and a ``KVCache`` by hand and steps a model through sequences."""

from __future__ import annotations

import torch

from outrider.kv_layout import plan_layout
from outrider.models.decoder import Decoder
from outrider.runner.batch import AttentionBatch, Batch, ImageBatch
from outrider.runner.kv_cache import KVCache

Work = list[tuple[int, list[int]]]


class PagedDriver:
    """A few sequences on one cache whose blocks are handed out in random order."""

    def __init__(
        self,
        model: Decoder,
        num_seqs: int = 1,
        max_len: int = 256,
        block_size: int = 8,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        layout = plan_layout(config.rope_layers, config.attention_chunk_size, max_len, block_size)
        num_groups, per_seq = len(layout.groups), -(-max_len // block_size)
        num_blocks = num_groups * num_seqs * per_seq
        self.kv = KVCache(
            layout,
            1 + num_blocks,
            model.kv_heads_per_rank,
            config.head_dim,
            kv_dtype or model.dtype,
            model.device,
        )
        blocks = 1 + torch.randperm(num_blocks)
        self.tables = blocks.view(num_groups, num_seqs, per_seq).to(torch.int32)
        self.lengths = [0] * num_seqs

    def batch(self, work: Work, images: ImageBatch | None = None) -> Batch:
        """One step: ``(sequence, its next ids)``, single tokens (decodes) first."""
        assert [len(ids) == 1 for _, ids in work] == sorted((len(ids) == 1 for _, ids in work), reverse=True)
        token_ids, positions, slots, query_start, seq_lens = [], [], [], [0], []
        for seq, ids in work:
            at = torch.arange(self.lengths[seq], self.lengths[seq] + len(ids))
            blocks = self.tables[:, seq, at // self.block_size].long()
            slots.append(blocks * self.block_size + at % self.block_size)
            token_ids += ids
            positions.append(at)
            self.lengths[seq] += len(ids)
            query_start.append(len(token_ids))
            seq_lens.append(self.lengths[seq])
        attention = AttentionBatch(
            query_start=torch.tensor(query_start, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_tables=self.tables[:, [seq for seq, _ in work]],
            slots=torch.cat(slots, dim=1),
            num_decodes=sum(len(ids) == 1 for _, ids in work),
            max_query_len=max(len(ids) for _, ids in work),
            max_seq_len=max(seq_lens),
        )
        return Batch(torch.tensor(token_ids), torch.cat(positions), attention, images)

    def step(self, work: Work, images: ImageBatch | None = None) -> torch.Tensor:
        """Float32 logits ``[len(work), V]`` after the last id of each sequence."""
        batch = self.batch(work, images)
        hidden = self.model.forward(batch, self.kv)
        return self.model.logits(hidden[batch.attention.query_start[1:].long() - 1]).float()

    def prefill(self, ids: list[int], chunk: int, seq: int = 0) -> torch.Tensor:
        """Logits ``[V]`` after ``ids``, computed ``chunk`` at a time."""
        for start in range(0, len(ids), chunk):
            logits = self.step([(seq, ids[start : start + chunk])])
        return logits[0]

    def greedy(self, logits: torch.Tensor, count: int, seq: int = 0) -> list[int]:
        """``count`` greedy ids, the first from ``logits``."""
        ids: list[int] = []
        for _ in range(count):
            ids.append(int(logits.argmax()))
            logits = self.step([(seq, [ids[-1]])])[0]
        return ids


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``|found - wanted| / |wanted|`` in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
