"""Programmatic dependent launch: a kernel's blocks are set up while the kernel before still runs.

Used by the kernels of a small decode step, which are as short as the gaps between them. Every kernel that is launched
with ``overlap_options`` calls ``wait_for_inputs`` before it touches memory; that call returns when all kernels before
have finished and their writes are visible. Hopper and later; elsewhere launches follow one another as usual.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import interpreted

OVERLAP = False
"""Off until ``benchmarks.kernels.step`` has shown equal results and a gain on a GPU."""


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until the kernels before are done, then let the next one set up its blocks."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap_options(device: torch.device) -> dict[str, bool]:
    """The launch arguments of a kernel that has an ``OVERLAP`` constant."""
    if OVERLAP and _has_dependent_launch(device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@functools.cache
def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)
