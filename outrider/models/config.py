"""What a checkpoint says about itself: one frozen dataclass for every architecture served here.

Read by the front end (context length, special ids), the memory plan and the models. No torch.
Sources: the checkpoint's ``config.json`` (nested or flat, old or new spelling), ``generation_config.json``,
``hf_quant_config.json``; or a GGUF file's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """llama3 frequency scaling; ``low == high`` means no middle band (Scout)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The Llama 4 vision tower and projector, as the checkpoint's ``vision_config`` gives them."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    rope_theta: float
    norm_eps: float
    num_channels: int = 3

    @property
    def tokens_per_tile(self) -> int:
        """Patch tokens that one tile becomes after the pixel shuffle."""
        return int((self.image_size // self.patch_size) ** 2 * self.pixel_shuffle_ratio**2)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The checkpoint's quantization: ``algo`` is ``FP8`` or ``NVFP4``; ``ignore`` are fnmatch globs."""

    algo: str
    kv_cache_algo: str | None = None
    group_size: int | None = None
    ignore: tuple[str, ...] = ()


MAX_LAYERS = 1024
"""A config that names more lies: per-layer facts are listed before memory is checked."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder; per-layer facts are tuples of ``num_layers`` entries.

    ``rope_layers[i]``: layer i rotates q/k and, when ``attention_chunk_size`` is set, sees only its own
    chunk of positions. ``moe_layers[i]``: layer i is a mixture of experts. ``interleaved_rope``: pairs
    are adjacent (Llama 4, GGUF) rather than half-split (Llama 2/3 safetensors).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    dtype: str
    rope_layers: tuple[bool, ...]
    moe_layers: tuple[bool, ...]
    interleaved_rope: bool
    rope_scaling: RopeScaling | None = None
    intermediate_size_mlp: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 1
    attention_chunk_size: int | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    quant: QuantConfig | None = None
    generation: dict[str, float | int | bool] = field(default_factory=dict)
