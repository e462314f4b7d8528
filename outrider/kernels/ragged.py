"""Copies that end where an expert's rows end: descriptors of grouped rows.

Called by ``nvfp4_stream``. The copy engine fills what lies outside a descriptor's bounds with zeros and reads nothing
for it, but bounds are those of the tensor. Here a group's rows are counted backwards from a bound of 2**30, so that its
last row is the last there is, and two dimensions more lead from there to the row's address: one adds a row for each
row before the group's end, the other 2**64 bytes less 2**30 rows, and addresses wrap around at 2**64. The idea is that
of ``triton.tools.ragged_tma``, which makes descriptors without a layout in shared memory.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_BOUND = gl.constexpr(1 << 30)


def ragged_descriptor(
    x: torch.Tensor, axis: int, box: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """A descriptor of ``x``, e4m3 of at most three dimensions of which ``axis`` counts rows, and of boxes of its rank.

    ``layout`` has two dimensions more than ``x``. Copies go to ``[1, 1, *box]`` in shared memory
    and start at ``group_place``, whose last number takes the place of the row's, among the other coordinates.
    """
    shape, row = list(x.shape), x.stride(axis)
    shape[axis] = _BOUND.value
    outer = 2**31 - 1
    return TensorDescriptor(x, [outer, outer, *shape], [2**34 - row, row, *x.stride()], [1, 1, *box], layout)


@gluon.jit
def group_place(row, end):
    """``(first, second, row's)`` coordinate of row ``row`` of a group whose last row is ``end - 1``."""
    return _BOUND, end, _BOUND - end + row
