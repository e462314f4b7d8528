"""The KV cache's tensors: memory and per-layer views. The books are in ``engine.blocks``; see ``kv_layout``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from outrider.kv_layout import KVLayout

if TYPE_CHECKING:
    import torch


class KVCache:
    """The tensors of one rank: ``[layers_per_block, num_blocks, 2, kv_heads, block_size, head_dim]``.

    Layer first: one layer's blocks then share few memory pages, which its attention kernel reads all at once.
    ``dtype`` is float32, bfloat16 or float8_e4m3fn. With FP8 the stored value is ``x / scale``; the scales
    belong to the layers, which read them from the checkpoint.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (layout.layers_per_block, num_blocks, 2, num_kv_heads, layout.block_size, head_dim)
        self.data = _zeros(shape, dtype, device)
        places = [(g, i, layer) for g, group in enumerate(layout.groups) for i, layer in enumerate(group)]
        self._group_of = {layer: g for g, _, layer in places}
        self._views = {layer: (self.data[i, :, 0], self.data[i, :, 1]) for _, i, layer in places}

    def group_of(self, layer: int) -> int:
        """The block-table group of a layer."""
        return self._group_of[layer]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(k, v)`` views of a layer, each ``[num_blocks, kv_heads, block_size, head_dim]`` (strided)."""
        return self._views[layer]

    @staticmethod
    def bytes_per_block(layout: KVLayout, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Memory of one block on one rank."""
        return layout.layers_per_block * 2 * num_kv_heads * layout.block_size * head_dim * itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU from untouched pages, which take no memory until a token is stored in them."""
    import torch

    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
