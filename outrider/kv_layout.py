"""How layers share the KV cache: pure arithmetic, read by the scheduler and by the runner.

Layers are split into *groups* of equal size; a block holds ``block_size`` tokens of every layer of one
group, so one pool of interchangeable blocks serves layers that keep everything (global attention) and
layers that keep one chunk (local attention). Block 0 is the null block: padding and freed entries of
block tables point at it, padded tokens write into it, and nobody reads it as data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Which group and which place inside it each layer has; pure arithmetic, also used by the scheduler.

    ``groups[g]`` lists the layer ids of group g; ``local[g]`` tells whether the group's layers see only their chunk.
    """

    groups: tuple[tuple[int, ...], ...]
    local: tuple[bool, ...]
    chunk_size: int | None
    block_size: int

    @property
    def layers_per_block(self) -> int:
        """Layers whose keys and values one block holds (short groups are padded)."""
        return max(len(g) for g in self.groups)


def plan_layout(
    rope_layers: tuple[bool, ...], chunk_size: int | None, max_model_len: int, block_size: int
) -> KVLayout:
    """Group the layers. One group when no chunk can ever end (``max_model_len <= chunk_size``)."""
    all_layers = tuple(range(len(rope_layers)))
    local = tuple(i for i in all_layers if rope_layers[i])
    full = tuple(i for i in all_layers if not rope_layers[i])
    if chunk_size is None or max_model_len <= chunk_size or not local:
        return KVLayout((all_layers,), (False,), None, block_size)
    size = _group_size(len(local), len(full))
    groups = [full[i : i + size] for i in range(0, len(full), size)]
    flags = [False] * len(groups)
    groups += [local[i : i + size] for i in range(0, len(local), size)]
    flags += [True] * (len(groups) - len(flags))
    return KVLayout(tuple(groups), tuple(flags), chunk_size, block_size)


def _group_size(num_local: int, num_full: int) -> int:
    """The size with the fewest padded layers, then the fewest groups."""
    if num_full == 0:
        return num_local

    def cost(size: int) -> tuple[int, int]:
        groups = -(-num_local // size) + -(-num_full // size)
        return groups * size, groups

    return min(range(1, max(num_local, num_full) + 1), key=cost)
