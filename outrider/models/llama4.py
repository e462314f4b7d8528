"""Llama 4 (Scout, Maverick): MoE or dense feed-forward by layer, and images in front of the decoder.

Rope, chunks, query/key norms and temperature come from the config and live in ``layers.Attention``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outrider.models.config import ModelConfig
from outrider.models.decoder import Decoder
from outrider.models.layers import FeedForward, GatedMLP
from outrider.models.moe import MoE
from outrider.models.vision import VisionEncoder
from outrider.quant.base import WeightBuilder

if TYPE_CHECKING:
    from outrider.runner.batch import Batch


class Llama4(Decoder):
    """``Llama4ForCausalLM`` and ``Llama4ForConditionalGeneration``; ``config.vision`` None leaves images out."""

    def __init__(self, config: ModelConfig, builder: WeightBuilder, kv_cache_dtype: torch.dtype) -> None:
        super().__init__(config, builder, kv_cache_dtype)
        self.vision: VisionEncoder | None = None
        if config.vision is not None and self.parallel.is_first_stage:
            self.vision = VisionEncoder(builder, config.vision, config.hidden_size)

    def build_feed_forward(self, builder: WeightBuilder, layer_id: int) -> FeedForward:
        """A mixture of experts, or Maverick's wider dense MLP, under ``feed_forward``."""
        config, name = self.config, f"layers.{layer_id}.feed_forward"
        if config.moe_layers[layer_id]:
            return MoE(builder, name, config)
        return GatedMLP(builder, name, config.hidden_size, config.intermediate_size_mlp)

    def is_unused(self, name: str) -> bool:
        """See ``Decoder``; the vision tower's tensors too where it is left out."""
        if name.startswith(("vision_model.", "multi_modal_projector.")):
            return self.vision is None
        return super().is_unused(name)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[N, 3, size, size]`` normalised tiles to the ``[N * tokens_per_tile, M]`` rows that stand for them."""
        assert self.vision is not None
        return self.vision(pixels)

    def embed_batch(self, batch: Batch) -> torch.Tensor:
        """``[T, M]``: embeddings, with image features in the rows of their patch tokens."""
        x = super().embed_batch(batch)
        if batch.images is not None:
            x[batch.images.token_idx] = batch.images.features.to(x.dtype)
        return x
