"""Programmatic dependent launch: a kernel's blocks are set up while the kernel before still runs.

Used by the kernels of a small decode step, which are as short as the gaps between them. The rule for a kernel that is
launched with ``overlap_options``: before ``wait_for_inputs`` it may read weights and other constants, nothing that any
kernel of the step writes, and it writes nothing. That suffices whatever the kernels: the wait ends when the kernel
before has finished, which itself waited for the one before it, so behind the wait everything earlier is done and
visible. Hopper and later; elsewhere launches follow one another as usual.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import interpreted

OVERLAP_ROWS = 16
"""Most rows of a launch that overlaps. H200, 2026-11-26: a layer 100.7 -> 90.9 us at one row, no gain from 16 on."""


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the kernels before are done, then let the next one set up its blocks: one waits at a time."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    ptr, first_row, end_row, row_stride, ROWS: tl.constexpr, BYTES: tl.constexpr, OVERLAP: tl.constexpr
):
    """Fetch ``BYTES`` (a power of two from 64, or 0) from ``ptr`` on of ``ROWS`` rows of weights into the L2 cache.

    For one-byte weights that a kernel reads behind its wait: memory is idle while a small kernel before it runs.
    """
    if OVERLAP and BYTES:
        PIECE: tl.constexpr = BYTES // 4
        pieces = tl.arange(0, 4) * PIECE
        rows = tl.minimum(first_row + tl.arange(0, ROWS), end_row - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            f"cp.async.bulk.prefetch.L2.global [$1], {PIECE};\nmov.u32 $0, 0;",
            "=r,l",
            [ptr + rows[:, None] * row_stride + pieces[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlap_options(device: torch.device, rows: int) -> dict[str, bool]:
    """The launch arguments of a kernel that has an ``OVERLAP`` constant, in a step of ``rows`` rows."""
    if rows <= OVERLAP_ROWS and _has_dependent_launch(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)
