"""The routed experts of a MoE layer in each weight format. Built by ``models.moe``; they call the MoE kernels.

Two checkpoint layouts are read: *fused* (``experts.gate_up_proj`` ``[E, M, 2I]``, ``experts.down_proj``
``[E, I, M]``, input dimension first, one scale for all experts) and *per expert*
(``experts.{e}.gate_proj.weight`` ``[I, M]`` and so on). In memory: ``w13[E, 2I, M]``, gate rows first, and
``w2[E, M, I]``. Legend: E experts and I intermediate size of this rank, M model dim.
Sources: Hugging Face Llama 4 checkpoints and ModelOpt's export of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from outrider.errors import CheckpointError
from outrider.kernels.moe import moe_bf16, moe_fp8, moe_nvfp4
from outrider.kernels.moe_nvfp4 import moe_nvfp4_repacked
from outrider.kernels.moe_w4a4 import moe_w4a4
from outrider.kernels.nvfp4 import BLOCK_SIZE, Nvfp4Path, nvfp4_path
from outrider.kernels.nvfp4_repack import can_repack, repack_nvfp4_
from outrider.kernels.w4a4 import DEPTH_MULTIPLE, Fp4Weight
from outrider.quant.base import Format, WeightBuilder, check_depth

logger = logging.getLogger("outrider.quant")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What the checkpoint has and what this rank holds of it.

    ``num_experts`` in all, ``experts = (first, count)`` held; ``hidden_size``; ``inter_size`` in all,
    ``inter = (start, length)`` held.
    """

    num_experts: int
    experts: tuple[int, int]
    hidden_size: int
    inter_size: int
    inter: tuple[int, int]

    @property
    def some_experts(self) -> tuple[int, int] | None:
        """``experts``, or None where this rank holds all: no row of the output then waits for another rank."""
        return None if self.experts == (0, self.num_experts) else self.experts


class Experts(Protocol):
    """``y[T, M]``: the sum over a token's chosen experts held here; ``x[T, M]`` is scaled by the score inside."""

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """``expert_ids`` int32 and ``scores`` f32, both ``[T, k]``; the result is new memory."""


def build_experts(builder: WeightBuilder, name: str, shape: ExpertShape) -> Experts:
    """The experts under module ``name`` for the format and layout that the checkpoint has."""
    fused = builder.source.dtype_of(f"{name}.gate_up_proj") is not None
    weights = _FusedLayout(builder, name, shape) if fused else _PerExpertLayout(builder, name, shape)
    fmt = builder.format_of(*weights.weight_names)
    return _EXPERTS[fmt](builder, weights, shape)


class _Layout(Protocol):
    """Registers slots for the two matrices; ``pack`` is how many in features one stored row or column holds."""

    weight_names: list[str]

    def add_matrices(self, suffix: str, w13: torch.Tensor, w2: torch.Tensor, pack: int) -> None:
        """Slots of every matrix ``suffix`` of both projections."""

    def add_scalars(self, suffix: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Slots of the one-element tensors; after loading, the call gives f32 ``[E]`` of ``w13`` and of ``w2``."""


class _FusedLayout:
    """``experts.gate_up_proj`` and ``experts.down_proj``; their scales are ``<name>_weight_scale`` and so on."""

    def __init__(self, builder: WeightBuilder, name: str, shape: ExpertShape) -> None:
        self.builder, self.name, self.shape = builder, name, shape
        self.weight_names = [f"{name}.gate_up_proj", f"{name}.down_proj"]

    def add_matrices(self, suffix: str, w13: torch.Tensor, w2: torch.Tensor, pack: int) -> None:
        """See ``_Layout``. One slot an expert bounds what is in flight to one expert's matrix."""
        shape = self.shape
        tail = "" if suffix == "weight" else f"_{suffix}"
        inter, (start, length) = shape.inter_size, shape.inter
        up_shape = (shape.num_experts, shape.hidden_size // pack, 2 * inter)
        down_shape = (shape.num_experts, inter // pack, shape.hidden_size)
        rows = slice(start // pack, (start + length) // pack)
        everything = slice(None)
        for i in range(shape.experts[1]):
            expert = slice(shape.experts[0] + i, shape.experts[0] + i + 1)
            gate, up = slice(start, start + length), slice(inter + start, inter + start + length)
            for half, dest in zip((gate, up), w13[i].chunk(2), strict=True):
                select = (expert, everything, half)
                self.builder.add_slot(
                    f"{self.name}.gate_up_proj{tail}", up_shape, dest, select, transpose=True
                )
            select = (expert, rows, everything)
            self.builder.add_slot(f"{self.name}.down_proj{tail}", down_shape, w2[i], select, transpose=True)

    def add_scalars(self, suffix: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """See ``_Layout``."""
        pair = self.builder.empty(2, dtype=torch.float32)
        self.builder.add_slot(f"{self.name}.gate_up_proj_{suffix}", (), pair[0])
        self.builder.add_slot(f"{self.name}.down_proj_{suffix}", (), pair[1])
        count = self.shape.experts[1]
        return lambda: (pair[0].repeat(count), pair[1].repeat(count))


class _PerExpertLayout:
    """``experts.{e}.{gate,up,down}_proj.<suffix>``, each as a linear layer stores it."""

    def __init__(self, builder: WeightBuilder, name: str, shape: ExpertShape) -> None:
        self.builder, self.name, self.shape = builder, name, shape
        first, count = shape.experts
        self.prefixes = [f"{name}.{first + i}" for i in range(count)]
        others = (i for i in range(shape.num_experts) if not first <= i < first + count)
        builder.unused_prefixes += [f"{name}.{i}." for i in others]
        projections = ("gate_proj", "up_proj", "down_proj")
        self.weight_names = [f"{prefix}.{p}.weight" for prefix in self.prefixes for p in projections]

    def add_matrices(self, suffix: str, w13: torch.Tensor, w2: torch.Tensor, pack: int) -> None:
        """See ``_Layout``."""
        shape = self.shape
        start, length = shape.inter
        rows, columns = slice(start, start + length), slice(start // pack, (start + length) // pack)
        up_shape = (shape.inter_size, shape.hidden_size // pack)
        down_shape = (shape.hidden_size, shape.inter_size // pack)
        for i, prefix in enumerate(self.prefixes):
            gate, up = w13[i].chunk(2)
            self.builder.add_slot(f"{prefix}.gate_proj.{suffix}", up_shape, gate, (rows, slice(None)))
            self.builder.add_slot(f"{prefix}.up_proj.{suffix}", up_shape, up, (rows, slice(None)))
            self.builder.add_slot(f"{prefix}.down_proj.{suffix}", down_shape, w2[i], (slice(None), columns))

    def add_scalars(self, suffix: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """See ``_Layout``. Gate and up share one GEMM here, so their scales must be equal."""
        table = self.builder.empty(3, len(self.prefixes), dtype=torch.float32)
        for i, prefix in enumerate(self.prefixes):
            for j, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                self.builder.add_slot(f"{prefix}.{projection}.{suffix}", (), table[j, i])

        def read() -> tuple[torch.Tensor, torch.Tensor]:
            if not torch.equal(table[0], table[1]):
                raise CheckpointError(
                    f"{self.name}.*.gate_proj.{suffix} and up_proj.{suffix} differ; export them with one scale."
                )
            return table[0], table[2]

        return read


class PlainExperts:
    """Weights in the model dtype."""

    def __init__(self, builder: WeightBuilder, weights: _Layout, shape: ExpertShape) -> None:
        (_, count), (_, inter), hidden = shape.experts, shape.inter, shape.hidden_size
        self.w13 = builder.empty(count, 2 * inter, hidden)
        self.w2 = builder.empty(count, hidden, inter)
        self.some_experts = shape.some_experts
        weights.add_matrices("weight", self.w13, self.w2, pack=1)

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """See ``Experts``."""
        return moe_bf16(x, expert_ids, scores, self.w13, self.w2, self.some_experts)


class Fp8Experts:
    """e4m3 weights with a scale per expert; activations e4m3 with static scales, applied after the score."""

    def __init__(self, builder: WeightBuilder, weights: _Layout, shape: ExpertShape) -> None:
        (_, count), (_, inter), hidden = shape.experts, shape.inter, shape.hidden_size
        self.w13 = builder.empty(count, 2 * inter, hidden, dtype=torch.float8_e4m3fn)
        self.w2 = builder.empty(count, hidden, inter, dtype=torch.float8_e4m3fn)
        self.weight_scales = builder.empty(2, count, dtype=torch.float32)
        self.input_scales = builder.empty(2, dtype=torch.float32)
        self.expert_range, self.some_experts = shape.experts, shape.some_experts
        weights.add_matrices("weight", self.w13, self.w2, pack=1)
        read_weight_scales = weights.add_scalars("weight_scale")
        read_input_scales = weights.add_scalars("input_scale")

        def finish() -> None:
            self.weight_scales.copy_(torch.stack(read_weight_scales()))
            self.input_scales.copy_(torch.stack(read_input_scales()).amax(dim=1))

        builder.after_load.append(finish)

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """See ``Experts``."""
        w13_scale, w2_scale = self.weight_scales[0], self.weight_scales[1]
        a13_scale, a2_scale = self.input_scales[0], self.input_scales[1]
        return moe_fp8(
            x,
            expert_ids,
            scores,
            self.w13,
            self.w2,
            w13_scale,
            w2_scale,
            a13_scale,
            a2_scale,
            self.some_experts,
        )


class Nvfp4Experts:
    """e2m1 weights packed two a byte along the input, e4m3 scales per 16, an f32 scale per projection.

    ``nvfp4_path`` of the device decides: activations become four bits too with the calibrated scales, or stay wide;
    on a GPU with FP8 but no FP4 tensor cores the loaded weights are reordered in place.
    """

    def __init__(self, builder: WeightBuilder, weights: _Layout, shape: ExpertShape) -> None:
        (_, count), (_, inter), hidden = shape.experts, shape.inter, shape.hidden_size
        fp8 = torch.float8_e4m3fn
        self.w13 = builder.empty(count, 2 * inter, hidden // 2, dtype=torch.uint8)
        self.w2 = builder.empty(count, hidden, inter // 2, dtype=torch.uint8)
        self.w13_block_scale = builder.empty(count, 2 * inter, hidden // BLOCK_SIZE, dtype=fp8)
        self.w2_block_scale = builder.empty(count, hidden, inter // BLOCK_SIZE, dtype=fp8)
        self.scales = builder.empty(2, dtype=torch.float32)
        self.expert_range, self.some_experts = shape.experts, shape.some_experts
        weights.add_matrices("weight", self.w13, self.w2, pack=2)
        weights.add_matrices("weight_scale", self.w13_block_scale, self.w2_block_scale, pack=BLOCK_SIZE)
        read_scales = weights.add_scalars("weight_scale_2")
        read_input_scales = weights.add_scalars("input_scale")
        self.repacked = False
        self.fp4: tuple[Fp4Weight, Fp4Weight] | None = None

        def finish() -> None:
            scales = torch.stack(read_scales())
            if not bool((scales == scales[:, :1]).all()):
                raise CheckpointError(
                    "The experts' weight_scale_2 differ; export them with one scale for all."
                )
            self.scales.copy_(scales[:, 0])
            path = nvfp4_path(builder.device)
            self.repacked = path is Nvfp4Path.FP8 and divisible
            if path is Nvfp4Path.FP8 and not divisible:
                _warn_of_shape(tuple(self.w13.shape))
            if self.repacked:
                repack_nvfp4_(self.w13, self.w13_block_scale, gated=True)
                repack_nvfp4_(self.w2, self.w2_block_scale, gated=False)
            if path is Nvfp4Path.W4A4:
                check_depth(weights.weight_names[0], hidden, DEPTH_MULTIPLE)
                check_depth(weights.weight_names[-1], inter, DEPTH_MULTIPLE)
                up, down = torch.stack(read_input_scales()).amax(dim=1)
                self.fp4 = (
                    Fp4Weight(self.w13, self.w13_block_scale, self.scales[0], up),
                    Fp4Weight(self.w2, self.w2_block_scale, self.scales[1], down),
                )

        divisible = can_repack(2 * inter, hidden, gated=True) and can_repack(hidden, inter, gated=False)
        builder.after_load.append(finish)

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """See ``Experts``."""
        if self.fp4 is not None:
            return moe_w4a4(x, expert_ids, scores, *self.fp4, self.some_experts)
        op = moe_nvfp4_repacked if self.repacked else moe_nvfp4
        out: torch.Tensor = op(
            x, expert_ids, scores,
            self.w13, self.w13_block_scale, self.scales[0],
            self.w2, self.w2_block_scale, self.scales[1],
            self.some_experts,
        )  # fmt: skip
        return out


@functools.cache
def _warn_of_shape(shape: tuple[int, ...]) -> None:
    """Say once a shape that experts do not divide into the tiles of the fast path."""
    logger.warning("NVFP4 experts of packed shape %s are decoded before each product, which is slow.", shape)


_EXPERTS: dict[Format, type[PlainExperts] | type[Fp8Experts] | type[Nvfp4Experts]] = {
    Format.PLAIN: PlainExperts,
    Format.FP8: Fp8Experts,
    Format.NVFP4: Nvfp4Experts,
}
