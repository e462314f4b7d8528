"""The decoder that every served architecture is: embed, layers, norm, head. Subclassed by ``llama`` and ``llama4``.

Called by the runner: ``forward`` once a step on every pipeline stage, ``logits`` on the last. Holds no state
between steps; keys and values live in the ``KVCache`` passed in. Legend: T tokens, M model dim, N rows, V vocab.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from outrider.kernels.norm import Addend, summed
from outrider.kernels.quantize import Product
from outrider.models.config import ModelConfig
from outrider.models.layers import (
    Attention,
    Embedding,
    FeedForward,
    Head,
    RMSNorm,
    rope_frequencies,
    shard_kv_heads,
)
from outrider.quant.base import WeightBuilder

if TYPE_CHECKING:
    from outrider.runner.batch import Batch
    from outrider.runner.kv_cache import KVCache


MOST_ROWS = 4096
"""Rows of a step that a feed-forward part takes at once: more need memory (Scout: 0.1 MB a row) and save no time."""


class DecoderLayer:
    """Attention and feed-forward, each behind a norm; the residual runs beside them."""

    def __init__(
        self,
        builder: WeightBuilder,
        config: ModelConfig,
        layer_id: int,
        attention: Attention,
        feed_forward: FeedForward,
    ) -> None:
        name, size, eps = f"layers.{layer_id}", config.hidden_size, config.rms_norm_eps
        self.parallel = builder.parallel
        self.input_norm = RMSNorm(builder, f"{name}.input_layernorm", size, eps)
        self.post_norm = RMSNorm(builder, f"{name}.post_attention_layernorm", size, eps)
        self.attention = attention
        self.feed_forward = feed_forward

    def __call__(
        self,
        x: Addend,
        residual: torch.Tensor | None,
        batch: Batch,
        kv: KVCache,
        rows: torch.Tensor | None = None,
    ) -> tuple[Addend, torch.Tensor]:
        """``(x, residual)`` whose sum is the hidden state; ``residual`` None means that ``x`` alone is it.

        With ``rows`` int64 ``[N]`` the result has these rows alone; all of them leave keys and values.
        """
        normed = self.input_norm.before(self.attention.qkv, x, residual)
        residual = summed(x) if residual is None else residual
        attended = self.attention(normed, batch, kv)
        if rows is not None:
            attended, residual = attended[rows], residual[rows]
        out = self._fed_forward(attended, residual)
        if self.parallel.tp_size > 1:
            out = self.parallel.all_reduce(summed(out))
        return out, residual

    def _fed_forward(self, x: Product, residual: torch.Tensor) -> Addend:
        """The second half of the layer; of many rows some at a time, which then replace ``x``."""
        if x.shape[0] <= MOST_ROWS:
            return self.feed_forward.behind(self.post_norm, x, residual)
        x = summed(x)
        for rows, old in zip(x.split(MOST_ROWS), residual.split(MOST_ROWS), strict=True):
            rows.copy_(summed(self.feed_forward.behind(self.post_norm, rows, old)))
        return x


class Decoder(ABC):
    """One rank's part of a model. Attributes are set once; weights arrive through ``builder.slots``."""

    def __init__(self, config: ModelConfig, builder: WeightBuilder, kv_cache_dtype: torch.dtype) -> None:
        self.config = config
        self.builder = builder
        self.parallel = parallel = builder.parallel
        self.dtype, self.device = builder.dtype, builder.device
        self.layer_ids = parallel.layer_range(config.num_layers)
        self.kv_heads_per_rank = shard_kv_heads(parallel, config.num_kv_heads)[1]
        inv_freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, builder.device)
        self.embed: Embedding | None = None
        if parallel.is_first_stage or (parallel.is_last_stage and config.tie_word_embeddings):
            self.embed = Embedding(
                builder,
                "embed_tokens",
                config.vocab_size,
                config.hidden_size,
                by_row=not config.tie_word_embeddings,
            )
        self.layers = [
            DecoderLayer(
                builder,
                config,
                i,
                Attention(builder, config, i, inv_freq, kv_cache_dtype),
                self.build_feed_forward(builder, i),
            )
            for i in self.layer_ids
        ]
        self.norm: RMSNorm | None = None
        self.head: Head | None = None
        if parallel.is_last_stage:
            self.norm = RMSNorm(builder, "norm", config.hidden_size, config.rms_norm_eps)
            tied = self.embed if config.tie_word_embeddings else None
            self.head = Head(builder, config.vocab_size, config.hidden_size, tied)

    @abstractmethod
    def build_feed_forward(self, builder: WeightBuilder, layer_id: int) -> FeedForward:
        """The feed-forward part of layer ``layer_id``."""

    def is_unused(self, name: str) -> bool:
        """Whether this rank may leave the checkpoint tensor ``name`` unread: another stage's, or derived."""
        parts = name.split(".")
        if parts[0] == "layers" and parts[1].isdigit() and int(parts[1]) not in self.layer_ids:
            return int(parts[1]) < self.config.num_layers
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings or not self.parallel.is_last_stage
        if name == "embed_tokens.weight":
            return self.embed is None
        if name == "norm.weight":
            return not self.parallel.is_last_stage
        return name.endswith("rotary_emb.inv_freq")

    def weight_bytes(self) -> int:
        """Bytes of this rank's weights as allocated, on the device and in host memory."""
        return self.builder.num_bytes + self.builder.num_table_bytes

    def embed_batch(self, batch: Batch) -> torch.Tensor:
        """``[T, M]`` embeddings of the step's tokens."""
        assert self.embed is not None
        return self.embed(batch.token_ids)

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Within, ``forward`` runs one layer of each kind: every kernel of a step, in a fraction of the time.

        The last layer runs besides, because it may run with other numbers of rows.
        """
        layers = self.layers
        kinds = {(layer.attention.kind, layer.feed_forward.kind): layer for layer in layers}
        self.layers = [*kinds.values(), layers[-1]]
        try:
            yield
        finally:
            self.layers = layers

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KVCache, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, M]``: normed hidden states of ``batch.output_rows``; before the last stage ``[T, M]`` for the next one.

        ``hidden`` is what the stage before returned; None on the first stage.
        """
        x: Addend = self.embed_batch(batch) if hidden is None else hidden
        residual: torch.Tensor | None = None
        for layer in self.layers[:-1]:
            x, residual = layer(x, residual, batch, kv)
        # Behind the last attention no token needs the others.
        rows = batch.output_rows if self.norm is not None else None
        x, residual = self.layers[-1](x, residual, batch, kv, rows)
        if self.norm is not None:
            return self.norm(x, residual).y
        return residual.add_(summed(x))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[N, V]`` in the model dtype from rows ``[N, M]`` of the last stage's ``forward``."""
        assert self.head is not None
        return self.head(hidden)
