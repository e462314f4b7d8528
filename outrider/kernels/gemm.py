"""Dense matrix products: plain, and FP8 with static scales.

Called by the linear layers of ``quant``. Never quantises anything itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from outrider.kernels._dispatch import on_gpu


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x[T, K] @ weight[N, K].T -> [T, N]`` in the common dtype, float32 accumulation."""
    return F.linear(x, weight)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(x · weightᵀ) · x_scale · w_scale -> [T, N]`` with a float32 accumulator.

    ``x`` e4m3 [T, K], ``weight`` e4m3 [N, K]; ``x_scale`` f32 of one element or [T] (a scale a row);
    ``w_scale`` f32 [N], one value an output, which keeps fused shards with different scales exact.
    """
    return fp8_linear_reference(x, weight, x_scale, w_scale, out_dtype)


def fp8_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Plain-torch ``fp8_linear``: the product in float32, scaled afterwards."""
    product = F.linear(x.float(), weight.float())
    return (product * (x_scale.reshape(-1, 1) * w_scale)).to(out_dtype)
