"""A MoE layer's weights, handed to the kernels that run the whole layer for a few tokens. Built by ``models.moe``.

Holds no weights of its own: it reads those of the routed experts and of the shared expert's linears.
"""

from __future__ import annotations

from typing import Protocol

import torch

from outrider.kernels.invariant import is_invariant
from outrider.kernels.moe_few import ExpertWeights, NormWeights, SharedWeights, moe_few
from outrider.kernels.moe_few_kernels import FEW_ROWS
from outrider.kernels.moe_one_nvfp4 import Nvfp4ExpertWeights, SharedRows, moe_one, one_token_fits
from outrider.quant.experts import Experts, Fp8Experts, Nvfp4Experts
from outrider.quant.linear import Fp8Linear, Linear, Nvfp4Linear


class FewRowsMoE(Protocol):
    """``shared(y) + expert(score * y)``, ``y = norm(x + residual)``, with one expert a token."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether these rows are few enough. On a CPU the separate operations are as good; only they are invariant."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """``[T, M]`` of ``x[T, M]`` in the model dtype; the sum replaces ``residual``."""


class Fp8FewRows:
    """Up to ``FEW_ROWS`` rows in FP8, weights and activations."""

    def __init__(
        self, router: torch.Tensor, experts: Fp8Experts, gate_up: Fp8Linear, down: Fp8Linear
    ) -> None:
        self.router = router
        self.experts = ExpertWeights(
            experts.w13, experts.w2,
            experts.weight_scales[0], experts.weight_scales[1],
            experts.input_scales[0], experts.input_scales[1],
            experts.expert_range,
        )  # fmt: skip
        self.shared = SharedWeights(
            gate_up.weight, gate_up.weight_scale, gate_up.scale, down.weight, down.weight_scale, down.scale
        )

    def takes(self, x: torch.Tensor) -> bool:
        """See ``FewRowsMoE``."""
        return x.is_cuda and x.shape[0] <= FEW_ROWS and not is_invariant()

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See ``FewRowsMoE``."""
        return moe_few(x, residual, NormWeights(norm_weight, eps), self.router, self.experts, self.shared)


class Nvfp4OneRow:
    """One row with NVFP4 weights in the order and form that they have on Hopper; that is known after loading."""

    def __init__(
        self, router: torch.Tensor, experts: Nvfp4Experts, gate_up: Nvfp4Linear, down: Nvfp4Linear
    ) -> None:
        self.router = router
        self.routed = experts
        self.gate_up, self.down = gate_up, down

    def takes(self, x: torch.Tensor) -> bool:
        """See ``FewRowsMoE``."""
        return (
            x.is_cuda
            and x.shape[0] == 1
            and not is_invariant()
            and self.routed.repacked
            and self.down.fp8_rows is not None
            and one_token_fits(x.shape[1], self.down.fp8_rows[0].shape[1])
        )

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See ``FewRowsMoE``."""
        routed = self.routed
        assert self.gate_up.fp8_rows is not None and self.down.fp8_rows is not None
        experts = Nvfp4ExpertWeights(
            routed.w13, routed.w13_block_scale, routed.scales[0],
            routed.w2, routed.w2_block_scale, routed.scales[1],
            routed.expert_range,
        )  # fmt: skip
        shared = SharedRows(*self.gate_up.fp8_rows, *self.down.fp8_rows)
        return moe_one(x, residual, NormWeights(norm_weight, eps), self.router, experts, shared)


def few_rows_moe(
    router: torch.Tensor, top_k: int, experts: Experts, gate_up: Linear, down: Linear
) -> FewRowsMoE | None:
    """The few-rows form of a MoE layer, or None where its formats or ``top_k`` have none."""
    if top_k != 1:
        return None
    if isinstance(experts, Fp8Experts) and isinstance(gate_up, Fp8Linear) and isinstance(down, Fp8Linear):
        return Fp8FewRows(router, experts, gate_up, down)
    if (
        isinstance(experts, Nvfp4Experts)
        and isinstance(gate_up, Nvfp4Linear)
        and isinstance(down, Nvfp4Linear)
    ):
        return Nvfp4OneRow(router, experts, gate_up, down)
    return None
