"""Llama 4's mixture of experts: router, routed experts, shared expert. Called by ``llama4``.

The sigmoid of the router's logit scales the *input* of the chosen expert (inside the kernel); the shared
expert sees the input unscaled. Expert parallelism splits the routed experts over the tensor group; the
shared expert is always split by column.
"""

from __future__ import annotations

import torch

from outrider.kernels.beside import run_beside
from outrider.kernels.norm import Addend, LazySum, Normed
from outrider.kernels.quantize import Product
from outrider.kernels.router import route_rows
from outrider.models.config import ModelConfig
from outrider.models.layers import FeedForward, GatedMLP, RMSNorm
from outrider.quant.base import WeightBuilder
from outrider.quant.experts import ExpertShape, build_experts
from outrider.quant.few_rows import few_rows_moe


class MoE(FeedForward):
    """``shared(x) + sum over the chosen experts of expert(score * x)``; the caller sums over the tensor group."""

    def __init__(self, builder: WeightBuilder, name: str, config: ModelConfig) -> None:
        parallel = builder.parallel
        hidden, inter = config.hidden_size, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.router = builder.param(f"{name}.router.weight", config.num_experts, hidden)
        if parallel.expert_parallel:
            experts, columns = parallel.shard(config.num_experts, "num_local_experts"), (0, inter)
        else:
            experts, columns = (0, config.num_experts), parallel.shard(inter, "intermediate_size")
        shape = ExpertShape(config.num_experts, experts, hidden, inter, columns)
        self.experts = build_experts(builder, f"{name}.experts", shape)
        self.shared = GatedMLP(builder, f"{name}.shared_expert", hidden, inter)
        self.few_rows = few_rows_moe(
            self.router, self.top_k, self.experts, self.shared.gate_up, self.shared.down
        )

    @property
    def kind(self) -> tuple[type, ...]:
        """See ``FeedForward``."""
        return MoE, type(self.experts), *self.shared.kind

    def __call__(self, x: Normed) -> LazySum:
        """``[T, M]``: this rank's share of the output; ``x.fp8`` is the shared expert's."""
        shared = run_beside(lambda: self.shared(x.operand), x.y)
        expert_ids, scores = route_rows(x.y, self.router, self.top_k)
        routed = self.experts(x.y, expert_ids, scores)
        return LazySum(shared(), routed)

    def behind(self, norm: RMSNorm, x: Product, residual: torch.Tensor) -> Addend:
        """See ``FeedForward``; for a few rows the norm is part of the layer's kernels."""
        if self.few_rows is not None and isinstance(x, torch.Tensor) and self.few_rows.takes(x):
            return self.few_rows(x, residual, norm.weight, norm.eps)
        return self(norm(x, residual, self.shared.gate_up.input_form(x.shape[0])))
