"""A MoE layer's FP8 weights, handed to the kernels that run the whole layer for a few tokens. Built by ``models.moe``.

Holds no weights of its own: it reads those of the routed experts and of the shared expert's linears.
"""

from __future__ import annotations

import torch

from outrider.kernels.invariant import is_invariant
from outrider.kernels.moe_few import ExpertWeights, NormWeights, SharedWeights, moe_few
from outrider.kernels.moe_few_kernels import FEW_ROWS
from outrider.quant.experts import Experts, Fp8Experts
from outrider.quant.linear import Fp8Linear, Linear


class FewRowsMoE:
    """``shared(y) + expert(score * y)``, ``y = norm(x + residual)``, with one expert a token, in FP8."""

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
        """Whether these rows are few enough. On a CPU the separate operations are as good; only they are invariant."""
        return x.is_cuda and x.shape[0] <= FEW_ROWS and not is_invariant()

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """``[T, M]`` of ``x[T, M]`` in the model dtype, T at most ``FEW_ROWS``; the sum replaces ``residual``."""
        return moe_few(x, residual, NormWeights(norm_weight, eps), self.router, self.experts, self.shared)


def few_rows_moe(
    router: torch.Tensor, top_k: int, experts: Experts, gate_up: Linear, down: Linear
) -> FewRowsMoE | None:
    """The few-rows form of a MoE layer, or None where its formats or ``top_k`` have none."""
    if not (
        isinstance(experts, Fp8Experts) and isinstance(gate_up, Fp8Linear) and isinstance(down, Fp8Linear)
    ):
        return None
    return FewRowsMoE(router, experts, gate_up, down) if top_k == 1 else None
