"""The pool of KV cache blocks: who holds which id, and which contents can be found again.

Called by ``kv_manager`` only. Pure books: no tensors, no torch. Every id is in exactly one state:

    free     ref 0, no content worth keeping            -> ``_free`` (stack)
    cached   ref 0, content published under a key       -> ``_cached`` (least recently used first)
    used     ref >= 1                                   -> held by that many block tables
    null     id 0, never handed out
"""

from __future__ import annotations

from collections import OrderedDict

BlockKey = tuple[int, bytes]
"""``(group, chained content digest)``: what a published block is found by."""


class BlockPool:
    """Allocates, shares and remembers ``num_blocks`` blocks (id 0 is the null block)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError("a block pool needs the null block and at least one other")
        self.num_blocks = num_blocks
        self._free: list[int] = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._key_of: list[BlockKey | None] = [None] * num_blocks
        self._id_of: dict[BlockKey, int] = {}

    @property
    def capacity(self) -> int:
        """Blocks that can hold data at all."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` could hand out now (free, or cached and evictable)."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.capacity - self.num_available

    def try_allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with one reference each, or None (and nothing changed) if there are not as many."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        self._refs[block_id] = 1
        return block_id

    def _forget(self, block_id: int) -> None:
        key = self._key_of[block_id]
        if key is not None:
            del self._id_of[key]
            self._key_of[block_id] = None

    def find(self, key: BlockKey) -> int | None:
        """The block that holds this content, used or cached; takes no reference."""
        return self._id_of.get(key)

    def share(self, block_id: int) -> None:
        """One more holder of a block that ``find`` gave."""
        if self._refs[block_id] == 0:
            del self._cached[block_id]
        self._refs[block_id] += 1

    def publish(self, block_id: int, key: BlockKey) -> None:
        """The block's content is complete and can be found under ``key``; the first publisher of a key wins."""
        if key not in self._id_of and self._key_of[block_id] is None:
            self._id_of[key] = block_id
            self._key_of[block_id] = key

    def release(self, block_id: int) -> None:
        """One holder less; at zero the block is cached if published, else free."""
        self._refs[block_id] -= 1
        assert self._refs[block_id] >= 0, f"block {block_id} released twice"
        if self._refs[block_id] == 0:
            if self._key_of[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def reset_cache(self) -> None:
        """Forget every published content; blocks in use stay in use."""
        for block_id in self._cached:
            self._free.append(block_id)
        self._cached.clear()
        self._id_of.clear()
        self._key_of = [None] * self.num_blocks

    def check_integrity(self, held: dict[int, int]) -> None:
        """Compare the books with ``held`` (block id -> number of tables that list it).

        Raises ``AssertionError`` naming the first contradiction. Called when idle and after every test.
        """
        for block_id in range(1, self.num_blocks):
            expected = held.get(block_id, 0)
            assert self._refs[block_id] == expected, (
                f"block {block_id}: {self._refs[block_id]} references, {expected} holders"
            )
        free, cached = set(self._free), set(self._cached)
        used = {i for i in range(1, self.num_blocks) if self._refs[i] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), "a block is in two states"
        assert len(free) + len(cached) + len(used) == self.capacity, "a block is in no state"
        for key, block_id in self._id_of.items():
            assert self._key_of[block_id] == key and block_id not in free, f"block {block_id}: stale key"
