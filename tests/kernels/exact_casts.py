"""Make Triton's interpreter round float32 to bfloat16 and e4m3 as a GPU does; imported by the kernel tests.

The interpreter cuts bfloat16 off instead of rounding, and loses the carry when an e4m3 mantissa rounds up to the
next power of two (7.8 becomes 4). Torch's casts are used instead. On a GPU nothing is patched.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from outrider.kernels._dispatch import interpreted

_TARGETS = {tl.bfloat16: (torch.bfloat16, torch.int16), tl.float8e4nv: (torch.float8_e4m3fn, torch.int8)}
_original = interpreter._convert_float


def _convert(data, source, target, rounding):
    """``interpreter._convert_float``, exact for casts from float32 to the two narrow types."""
    if source != tl.float32 or target not in _TARGETS:
        return _original(data, source, target, rounding)
    narrow, bits = _TARGETS[target]
    wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    return wide.to(narrow).view(bits).numpy().view(f"uint{target.primitive_bitwidth}").reshape(np.shape(data))


if interpreted():
    interpreter._convert_float = _convert
