"""Teach Triton's interpreter ``tl.dot_scaled`` for NVFP4; imported by the W4A4 tests.

The interpreter of Triton 3.6 has no such product and that of 3.9 reads e4m3 block scales as powers of two. This one
handles e2m1 times e2m1 with e4m3 scales, packed along the depth, and refuses all else. On a GPU nothing is patched.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from outrider.kernels._dispatch import interpreted

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat((_MAGNITUDES, -_MAGNITUDES))


def _operand(codes: np.ndarray, scales: interpreter.TensorHandle) -> torch.Tensor:
    """[rows, K/2] bytes and [rows, K/16] scales to the values [rows, K] in float32."""
    assert scales.dtype == tl.float8e4nv
    packed = torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8).copy()).int()
    values = torch.stack((_VALUES[packed & 15], _VALUES[packed >> 4]), dim=-1).flatten(-2)
    bits = torch.from_numpy(np.ascontiguousarray(scales.data).view(np.uint8).copy())
    wide = bits.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=-1)
    assert wide.shape == values.shape
    return values * wide


def _create_dot_scaled(
    _self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, _fast, lhs_k_pack, rhs_k_pack, acc
):
    """``lhs [M, K] · rhs [K, N] + acc`` in float32; ``rhs_scale`` is [N, K/16]."""
    assert "E2M1" in str(lhs_format) and "E2M1" in str(rhs_format) and lhs_k_pack and rhs_k_pack
    product = _operand(lhs.data, lhs_scale) @ _operand(rhs.data.swapaxes(-1, -2), rhs_scale).T
    return interpreter.TensorHandle(product.numpy() + acc.data, tl.float32)


if interpreted():
    interpreter.InterpreterBuilder.create_dot_scaled = _create_dot_scaled
