"""A weight matrix in the model dtype, in the layout its device multiplies fastest. Used by plain linears and the head.

On a CPU the weight is repacked once into oneDNN's blocked layout through the two ops that torch's own
inductor uses for frozen weights. All GEMMs of SmolLM2-135M in float32, 2 cores, torch 2.13, 2026-11-23, plain
against packed: 1 row 33 / 32 ms, 2 rows 278 / 38 ms, 16 rows 113 / 57 ms, 512 rows 797 / 342 ms (docs/log.md).
"""

from __future__ import annotations

import bisect

import torch

from outrider.kernels.gemm import linear

ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""oneDNN keeps code and scratch memory, 0.65 MB, for every number of rows that a matrix shape ever met, up to a
thousand of them (650 MB): products are padded to these, more than the last to its multiples.

CPU, 2026-11-26: 195 MB for 300 row counts of one 576 x 576 product (docs/log.md). Which 21 counts is not tuned.
"""

PACKED_FOR_ROWS = 64  # oneDNN picks the layout for this many rows; 64 was best or equal from 1 to 512
_PACKABLE = (torch.float32, torch.bfloat16)


class Matrix:
    """``weight[N, K]`` of the checkpoint; ``prepare`` is called once it is loaded."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.packed: torch.Tensor | None = None

    def prepare(self) -> None:
        """Repack on a CPU that oneDNN serves; the plain copy is then dropped unless others hold it."""
        packable = self.weight.device.type == "cpu" and self.weight.dtype in _PACKABLE
        if packable and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x[T, K] @ weight.T``, ``[T, N]`` in the dtype of ``x``."""
        if self.packed is None:
            return linear(x, self.weight)
        num_rows = x.shape[0]
        missing = padded_rows(num_rows) - num_rows
        if missing:
            x = torch.cat([x, x.new_zeros((missing, x.shape[1]))])
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return y[:num_rows] if missing else y


def padded_rows(num_rows: int) -> int:
    """Rows of the product that is computed for ``num_rows``: the next of ``ROW_COUNTS``, or of its last's multiples."""
    largest = ROW_COUNTS[-1]
    if num_rows > largest:
        return -(-num_rows // largest) * largest
    return ROW_COUNTS[bisect.bisect_left(ROW_COUNTS, num_rows)]
