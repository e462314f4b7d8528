"""Plain dense Llama (2, 3, SmolLM2, …): every layer has rope over the whole context and a gated MLP."""

from __future__ import annotations

from outrider.models.decoder import Decoder
from outrider.models.layers import FeedForward, GatedMLP
from outrider.quant.base import WeightBuilder


class Llama(Decoder):
    """``LlamaForCausalLM``, from safetensors (half-split rope) or GGUF (interleaved rope)."""

    def build_feed_forward(self, builder: WeightBuilder, layer_id: int) -> FeedForward:
        """A gated MLP under ``mlp``."""
        config = self.config
        return GatedMLP(builder, f"layers.{layer_id}.mlp", config.hidden_size, config.intermediate_size)
