"""The layers of a decoder: norm, attention, gated MLP, embedding, head. Called by ``decoder`` and ``moe``.

Each is complete at construction: it takes its memory from the ``WeightBuilder`` and holds its rank's share.
Legend: T tokens, M model dim, H query heads, K kv heads (both of this rank), D head dim, I intermediate, V vocab.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from outrider.errors import ConfigError
from outrider.kernels.activation import silu_mul
from outrider.kernels.attention import paged_attention
from outrider.kernels.embedding import embedding
from outrider.kernels.gemm import MOST_FEW_ROWS
from outrider.kernels.norm import Addend, Normed, rms_norm, rms_norm_operand
from outrider.kernels.quantize import Fp8Form, Fp8Rows, Operand, Product
from outrider.kernels.rope import RopeSpec, qkv_rope_store
from outrider.kernels.rope_attention import rope_attention, rope_attention_takes
from outrider.models.config import ModelConfig, RopeScaling
from outrider.parallel import Parallel
from outrider.quant.base import WeightBuilder
from outrider.quant.linear import Columns, Linear, Part, build_linear
from outrider.quant.matrix import Matrix

if TYPE_CHECKING:
    from outrider.runner.batch import Batch
    from outrider.runner.kv_cache import KVCache


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> torch.Tensor:
    """f32 ``[D/2]`` radians per position, with llama3 scaling: long wavelengths are divided by ``factor``.

    Computed on the CPU: on the ``meta`` device these operations import torch's compiler, a second of every start.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    freqs = 1.0 / theta**exponents
    if scaling is None:
        return freqs.to(device)
    wavelengths = 2 * math.pi / freqs
    old = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    scaled = torch.where(wavelengths > old / low, freqs / scaling.factor, freqs)
    if high > low:  # Scout has high == low: no wavelength lies between the bounds
        smooth = (old / wavelengths - low) / (high - low)
        blend = (1 - smooth) * freqs / scaling.factor + smooth * freqs
        scaled = torch.where((wavelengths <= old / low) & (wavelengths >= old / high), blend, scaled)
    return scaled.to(device)


class RMSNorm:
    """``x / rms(x) * weight``, optionally after adding to the residual, in the form that the next product wants."""

    def __init__(self, builder: WeightBuilder, name: str, size: int, eps: float) -> None:
        self.weight = builder.param(f"{name}.weight", size)
        self.eps = eps

    def __call__(
        self, x: Addend, residual: torch.Tensor | None = None, form: Fp8Form | None = None
    ) -> Normed:
        """``x[T, M]``; with ``residual`` (updated in place) the norm of their sum, in ``form`` too."""
        return rms_norm(x, self.weight, self.eps, residual, form)

    def before(self, linear: Linear, x: Addend, residual: torch.Tensor | None) -> Operand:
        """The same as ``linear`` wants it, for a norm that nothing else reads."""
        return rms_norm_operand(x, self.weight, self.eps, residual, linear.input_form(x.shape[0]))


class FeedForward(ABC):
    """The second half of a layer: a gated MLP or a mixture of experts."""

    @property
    @abstractmethod
    def kind(self) -> tuple[type, ...]:
        """Layers of equal kind launch the same kernels."""

    @abstractmethod
    def behind(self, norm: RMSNorm, x: Product, residual: torch.Tensor) -> Addend:
        """``[T, M]``: this rank's share of the output for ``norm(x + residual)``; the sum replaces ``residual``."""


class GatedMLP(FeedForward):
    """``down(silu(gate(x)) * up(x))``. The sum over the tensor group is left to the caller."""

    def __init__(self, builder: WeightBuilder, name: str, hidden_size: int, inter_size: int) -> None:
        self.parallel = builder.parallel
        start, length = builder.parallel.shard(inter_size, "intermediate_size")
        parts = tuple(Part(f"{name}.{p}_proj", inter_size, start, length) for p in ("gate", "up"))
        self.gate_up = build_linear(builder, parts, Columns(hidden_size, 0, hidden_size))
        down = (Part(f"{name}.down_proj", hidden_size, 0, hidden_size),)
        self.down = build_linear(builder, down, Columns(inter_size, start, length))

    @property
    def kind(self) -> tuple[type, ...]:
        """See ``FeedForward``."""
        return GatedMLP, type(self.gate_up), type(self.down)

    def __call__(self, x: Operand) -> Product:
        """``[T, M]``: this rank's share of the output."""
        gate_up = self.gate_up(x)
        inter = silu_mul(gate_up, self.down.input_form(gate_up.shape[0]))
        # Ranks, whose rows have scales of their own, add up what they mean; else the next norm reads it.
        return self.down(inter) if self.parallel.tp_size > 1 else self.down.unscaled(inter)

    def behind(self, norm: RMSNorm, x: Product, residual: torch.Tensor) -> Product:
        """See ``FeedForward``."""
        return self(norm.before(self.gate_up, x, residual))


class Attention:
    """Grouped-query attention over the paged KV cache, with rope or (Llama 4) with temperature tuning."""

    def __init__(
        self,
        builder: WeightBuilder,
        config: ModelConfig,
        layer_id: int,
        inv_freq: torch.Tensor,
        kv_cache_dtype: torch.dtype,
    ) -> None:
        name = f"layers.{layer_id}.self_attn"
        self.parallel = builder.parallel
        self.layer_id = layer_id
        self.sm_scale = config.head_dim**-0.5
        self.qkv, self.o, num_heads, num_kv_heads = _projections(builder, config, name)
        has_rope = config.rope_layers[layer_id]
        self.chunk_size = config.attention_chunk_size if has_rope else None
        temperature = (config.floor_scale, config.attn_scale)
        self.rope = RopeSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.head_dim,
            inv_freq=inv_freq if has_rope else None,
            interleaved=config.interleaved_rope,
            qk_norm_eps=config.rms_norm_eps if has_rope and config.use_qk_norm else None,
            temperature=temperature if config.attn_temperature_tuning and not has_rope else None,
        )
        self.k_scale, self.v_scale = 1.0, 1.0
        self._add_kv_scales(builder, name, used=kv_cache_dtype == torch.float8_e4m3fn)

    def _add_kv_scales(self, builder: WeightBuilder, name: str, used: bool) -> None:
        """Read the FP8 cache's scales, 1 where the checkpoint has none; a wider cache does not use them."""
        scales = torch.ones(2, dtype=torch.float32)
        for i, scale_name in enumerate((f"{name}.k_proj.k_scale", f"{name}.v_proj.v_scale")):
            if builder.source.dtype_of(scale_name) is not None:
                builder.add_slot(scale_name, (), scales[i])

        def finish() -> None:
            if used:
                self.k_scale, self.v_scale = scales.tolist()

        builder.after_load.append(finish)

    @property
    def kind(self) -> tuple[type, type, bool]:
        """Layers of equal kind launch the same kernels."""
        return type(self.qkv), type(self.o), self.rope.inv_freq is not None

    def __call__(self, x: Operand, batch: Batch, kv: KVCache) -> Product:
        """``[T, M]`` summed over the tensor group, of ``x`` as ``qkv`` wants it; stores this step's k and v."""
        shape = batch.attention
        group = kv.group_of(self.layer_id)
        k_cache, v_cache = kv.layer(self.layer_id)
        qkv = self.qkv.unscaled(x)
        form = self.o.input_form(qkv.shape[0])
        # A scale a row is the largest value of all heads, which no program of attention sees.
        out_scale = None if form is None else form.scale
        slots, tables, lens = shape.slots[group], shape.block_tables[group], shape.seq_lens
        scales = self.k_scale, self.v_scale
        if isinstance(qkv, torch.Tensor) and rope_attention_takes(
            qkv, shape.num_decodes, shape.max_seq_len, self.chunk_size
        ):
            out = rope_attention(
                qkv, self.rope, k_cache, v_cache, slots, tables, lens, shape.max_seq_len,
                self.sm_scale, self.chunk_size, *scales, out_scale,
            )  # fmt: skip
        else:
            q = qkv_rope_store(qkv, batch.positions, self.rope, k_cache, v_cache, slots, *scales)
            out = paged_attention(
                q, k_cache, v_cache, tables, shape.query_start, lens, shape.num_decodes,
                shape.max_query_len, shape.max_seq_len, self.sm_scale, self.chunk_size, *scales,
                out_scale=out_scale,
            )  # fmt: skip
        heads = out if out_scale is None else Fp8Rows(out, out_scale)
        if self.parallel.tp_size > 1:
            return self.parallel.all_reduce(self.o(heads))
        return self.o.unscaled(heads)


def _projections(builder: WeightBuilder, config: ModelConfig, name: str) -> tuple[Linear, Linear, int, int]:
    """The fused q/k/v and the o projection, with this rank's numbers of query and kv heads."""
    parallel, head_dim, hidden = builder.parallel, config.head_dim, config.hidden_size
    first, num_heads = parallel.shard(config.num_heads, "num_attention_heads")
    kv_first, num_kv_heads = shard_kv_heads(parallel, config.num_kv_heads)

    def part(letter: str, total: int, start: int, count: int) -> Part:
        return Part(f"{name}.{letter}_proj", total * head_dim, start * head_dim, count * head_dim)

    q = part("q", config.num_heads, first, num_heads)
    k, v = (part(letter, config.num_kv_heads, kv_first, num_kv_heads) for letter in "kv")
    qkv = build_linear(builder, (q, k, v), Columns(hidden, 0, hidden), config.attention_bias)
    cols = Columns(q.rows, q.start, q.length)
    o = build_linear(builder, (Part(f"{name}.o_proj", hidden, 0, hidden),), cols, config.attention_bias)
    return qkv, o, num_heads, num_kv_heads


def shard_kv_heads(parallel: Parallel, num_kv_heads: int) -> tuple[int, int]:
    """``(first, count)`` of this rank's kv heads; with more ranks than heads, each head is on several ranks."""
    if parallel.tp_size <= num_kv_heads:
        return parallel.shard(num_kv_heads, "num_key_value_heads")
    if parallel.tp_size % num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel-size {parallel.tp_size} must be a multiple of num_key_value_heads ({num_kv_heads})."
        )
    return parallel.tp_rank * num_kv_heads // parallel.tp_size, 1


class Embedding:
    """Token embeddings, split by rows of the vocabulary. ``by_row``: the table is never multiplied as a matrix."""

    def __init__(
        self, builder: WeightBuilder, name: str, vocab_size: int, hidden_size: int, *, by_row: bool
    ) -> None:
        self.parallel = builder.parallel
        self.start, self.length = builder.parallel.shard(vocab_size, "vocab_size")
        self.weight = (builder.table if by_row else builder.empty)(self.length, hidden_size)
        rows = slice(self.start, self.start + self.length)
        builder.add_slot(f"{name}.weight", (vocab_size, hidden_size), self.weight, (rows, slice(None)))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[T]`` ids to ``[T, M]``."""
        if self.parallel.tp_size == 1:
            return embedding(token_ids, self.weight)
        local = token_ids - self.start
        elsewhere = (local < 0) | (local >= self.length)
        rows = embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))


HEAD_ROWS = 16
"""On a GPU the head's rows come in multiples of this, above the few that its own kernel takes.

cuBLAS loads another kernel for other numbers of rows, and a load waits for all that is queued on the device: they are
all met before the first request.
"""


class Head:
    """Logits over the vocabulary from its own matrix or, tied, from the embedding's."""

    def __init__(
        self, builder: WeightBuilder, vocab_size: int, hidden_size: int, tied: Embedding | None = None
    ) -> None:
        self.parallel = builder.parallel
        source = tied or Embedding(builder, "lm_head", vocab_size, hidden_size, by_row=False)
        self.matrix = Matrix(source.weight)
        builder.after_load.append(self.matrix.prepare)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, M]`` to ``[N, V]``, gathered over the tensor group."""
        num_rows = len(hidden)
        if hidden.is_cuda and num_rows > MOST_FEW_ROWS and num_rows % HEAD_ROWS:
            hidden = F.pad(hidden, (0, 0, 0, -num_rows % HEAD_ROWS))
        return self.parallel.all_gather_last(self.matrix(hidden)[:num_rows])
