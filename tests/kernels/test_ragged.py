"""Descriptors whose boxes end with a group of rows: where their coordinates lead, and what lies outside."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl

from outrider.kernels.ragged import group_place, ragged_descriptor


def place(row: int, end: int) -> tuple[int, ...]:
    """``group_place`` as numbers."""
    return tuple(int(getattr(number, "value", number)) for number in group_place.fn(row, end))


def test_coordinates_lead_to_the_row_and_end_with_the_group():
    """Guards: a row of the next group, an address beside the row's, for rows in the middle of three dimensions too."""
    rows = torch.zeros(3000, 1024, dtype=torch.uint8)
    for x, axis in ((rows, 0), (rows.unflatten(1, (-1, 128)).transpose(0, 1), 1)):
        box = [2, 16, 128][-x.dim() :]
        desc = ragged_descriptor(x, axis, box, gl.NVMMASharedLayout(128, 8, x.dim() + 2))
        assert desc.block_shape == [1, 1, *box]
        for end in (1, 64, 3000):
            first, second, row_at = place(0, end)
            assert first < desc.shape[0] and second < desc.shape[1]
            for row in (0, end - 1, end, end + 127):
                assert place(row, end)[2] - row_at == row
                address = first * desc.strides[0] + second * desc.strides[1]
                address += place(row, end)[2] * desc.strides[axis + 2]
                assert address % 2**64 == row * 1024
                assert (place(row, end)[2] < desc.shape[axis + 2]) == (row < end)
