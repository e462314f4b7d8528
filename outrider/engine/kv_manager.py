"""Block tables of sequences: what each needs, what a prefix gives for free, what a chunk lets go.

Called by the scheduler. Sits between a ``Sequence`` (positions) and the ``BlockPool`` (ids); no torch.
A full group keeps every block. A local group (chunked attention) keeps only the blocks of the chunk that
the next position is in; older entries of its table become the null block 0.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter

from outrider.engine.blocks import BlockPool
from outrider.engine.sequence import Sequence
from outrider.kv_layout import KVLayout

BlockUpdate = tuple[int, int, int, int]
"""``(group, row, index, block_id)``: one write to a row's block table on the device."""


class KVManager:
    """Allocates, shares and frees the blocks of sequences according to the cache's layout."""

    def __init__(self, layout: KVLayout, num_blocks: int, enable_prefix_caching: bool) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks)
        self._block_size, self._chunk_size = layout.block_size, layout.chunk_size
        self.enable_prefix_caching = enable_prefix_caching
        self._secret = secrets.token_bytes(16)  # keys cannot be guessed across processes
        self._num_full = layout.local.count(False)
        self._num_local = layout.local.count(True)

    # -- sizes ---------------------------------------------------------------------------------------

    def num_blocks_for(self, num_tokens: int) -> int:
        """Most blocks a sequence of ``num_tokens`` positions holds at once."""
        size = self.layout.block_size
        full = -(-num_tokens // size)
        if not self._num_local or self.layout.chunk_size is None:
            return full * self._num_full
        # A chunk that does not start on a block border touches one block more.
        local = min(full, -(-self.layout.chunk_size // size) + (self.layout.chunk_size % size > 0))
        return full * self._num_full + local * self._num_local

    def chunk_start(self, position: int) -> int:
        """First position that local layers still need when computing ``position``."""
        chunk = self.layout.chunk_size
        return 0 if chunk is None else position // chunk * chunk

    def begins_chunk(self, position: int) -> bool:
        """Whether local layers forget everything before ``position`` when it is computed."""
        chunk = self._chunk_size
        return chunk is not None and position > 0 and position % chunk == 0

    def chunk_end(self, position: int) -> int | None:
        """Where the chunk of ``position`` ends, or None without chunks."""
        chunk = self.layout.chunk_size
        return None if chunk is None else (position // chunk + 1) * chunk

    # -- growth and release --------------------------------------------------------------------------

    def try_extend(self, seq: Sequence, num_tokens: int) -> list[BlockUpdate] | None:
        """Give the sequence blocks up to ``num_tokens`` positions; None, and nothing changed, if too few."""
        held = len(seq.block_tables[0])  # the tables of all groups grow together
        if num_tokens <= held * self._block_size:
            return []
        wanted = -(-num_tokens // self._block_size)
        new = self.pool.try_allocate((wanted - held) * len(seq.block_tables))
        if new is None:
            return None
        updates: list[BlockUpdate] = []
        for group, table in enumerate(seq.block_tables):
            for index in range(held, wanted):
                table.append(new.pop())
                updates.append((group, seq.row, index, table[-1]))
        return updates

    def table_updates(self, seq: Sequence) -> list[BlockUpdate]:
        """Writes that put the sequence's present tables (a prefix hit) into its device row."""
        return [
            (group, seq.row, index, block_id)
            for group, table in enumerate(seq.block_tables)
            for index, block_id in enumerate(table)
            if block_id
        ]

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Positions below ``num_tokens`` hold final k/v: publish full blocks, drop chunks that are over."""
        if self.enable_prefix_caching and num_tokens >= (seq.num_published + 1) * self._block_size:
            self._publish(seq, num_tokens)
        if self._chunk_size is not None and num_tokens >= self._chunk_size:
            self._drop_ended_chunks(seq, num_tokens)

    def release(self, seq: Sequence) -> None:
        """Give every block back; the sequence starts from nothing if it ever runs again."""
        for table in seq.block_tables:
            for block_id in reversed(table):  # the tail is evicted before the head it depends on
                if block_id:
                    self.pool.release(block_id)
            table.clear()
        seq.num_published = 0

    def _drop_ended_chunks(self, seq: Sequence, position: int) -> None:
        first = self.chunk_start(position) // self.layout.block_size
        for table, is_local in zip(seq.block_tables, self.layout.local, strict=True):
            if not is_local:
                continue
            for index in range(min(first, len(table)) - 1, -1, -1):
                if table[index] == 0:
                    break
                self.pool.release(table[index])
                table[index] = 0

    # -- prefix cache --------------------------------------------------------------------------------

    def match_prefix(self, seq: Sequence) -> int:
        """Share the longest cached beginning of the sequence; returns its number of tokens.

        The last token is always computed, since its logits are needed.
        """
        if not self.enable_prefix_caching or seq.request.sampling.prompt_logprobs is not None:
            return 0
        size = self.layout.block_size
        limit = (len(seq.token_ids) - 1) // size
        keys = self._keys(seq, limit)
        num_blocks = 0
        while num_blocks < limit and self._has_full(keys[num_blocks]):
            num_blocks += 1
        while num_blocks and not self._has_local(keys, num_blocks):
            num_blocks -= 1
        self._share(seq, keys, num_blocks)
        return num_blocks * size

    def _has_full(self, key: bytes) -> bool:
        return all(
            self.pool.find((group, key)) is not None
            for group, is_local in enumerate(self.layout.local)
            if not is_local
        )

    def _first_local(self, num_blocks: int) -> int:
        size = self.layout.block_size
        return self.chunk_start(num_blocks * size) // size

    def _has_local(self, keys: list[bytes], num_blocks: int) -> bool:
        return all(
            self.pool.find((group, keys[index])) is not None
            for group, is_local in enumerate(self.layout.local)
            if is_local
            for index in range(self._first_local(num_blocks), num_blocks)
        )

    def _share(self, seq: Sequence, keys: list[bytes], num_blocks: int) -> None:
        first_local = self._first_local(num_blocks)
        for group, is_local in enumerate(self.layout.local):
            table = seq.block_tables[group]
            for index in range(num_blocks):
                if is_local and index < first_local:
                    table.append(0)
                    continue
                block_id = self.pool.find((group, keys[index]))
                assert block_id is not None
                self.pool.share(block_id)
                table.append(block_id)
        seq.num_published = num_blocks

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        num_full_blocks = num_tokens // self.layout.block_size
        keys = self._keys(seq, num_full_blocks)
        for index in range(seq.num_published, num_full_blocks):
            for group, table in enumerate(seq.block_tables):
                if table[index]:
                    self.pool.publish(table[index], (group, keys[index]))
        seq.num_published = num_full_blocks

    def _keys(self, seq: Sequence, count: int) -> list[bytes]:
        """Chained digests of the first ``count`` full blocks: content, everything before it, images, salt."""
        size = self.layout.block_size
        keys = seq.block_keys
        while len(keys) < count:
            start = len(keys) * size
            parent = keys[-1] if keys else hashlib.sha256(seq.request.cache_salt.encode()).digest()
            digest = hashlib.blake2b(parent, digest_size=32, key=self._secret)
            digest.update(array("I", seq.token_ids[start : start + size]).tobytes())
            for image in seq.request.images:
                for span_start, span_len in image.spans:
                    if span_start < start + size and span_start + span_len > start:
                        digest.update(image.digest + (start - span_start).to_bytes(8, "little", signed=True))
            keys.append(digest.digest())
        return keys

    # -- the ledger ----------------------------------------------------------------------------------

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Every reference of the pool belongs to a table of one of ``sequences``, and the sum is whole."""
        held = Counter(
            block_id for seq in sequences for table in seq.block_tables for block_id in table if block_id
        )
        self.pool.check_integrity(dict(held))
