"""Llama 4 (Scout, Maverick): MoE or dense feed-forward by layer. Rope, chunks and norms come from the config."""

from __future__ import annotations

from outrider.models.decoder import Decoder, FeedForward
from outrider.models.layers import GatedMLP
from outrider.models.moe import MoE
from outrider.quant.base import WeightBuilder


class Llama4(Decoder):
    """The text model of ``Llama4ForCausalLM`` and ``Llama4ForConditionalGeneration``."""

    def build_feed_forward(self, builder: WeightBuilder, layer_id: int) -> FeedForward:
        """A mixture of experts, or Maverick's wider dense MLP, under ``feed_forward``."""
        config, name = self.config, f"layers.{layer_id}.feed_forward"
        if config.moe_layers[layer_id]:
            return MoE(builder, name, config)
        return GatedMLP(builder, name, config.hidden_size, config.intermediate_size_mlp)
