"""Llama 4's vision tower, pixel shuffle and projector: pixels of tiles to rows of the embedding space.

Called by ``llama4`` once per image; plain torch, not on the decode path. Held whole by every tensor rank of the
first pipeline stage. Knows no prompt: the caller places the rows. Legend: N tiles, P patches of a tile plus
class token, C vision width, H heads, D head dim, R rows (N times ``tokens_per_tile``), M model dim.
Source: the Hugging Face implementation's tensors and order of operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from outrider.models.config import VisionConfig
from outrider.quant.base import WeightBuilder


class _Affine:
    """``x @ weight.T + bias``; several checkpoint modules of equal shape may be stacked by rows."""

    def __init__(
        self, builder: WeightBuilder, names: tuple[str, ...], rows: int, cols: int, bias: bool = True
    ) -> None:
        self.weight = builder.empty(rows * len(names), cols)
        self.bias = builder.empty(rows * len(names)) if bias else None
        for i, name in enumerate(names):
            span = slice(i * rows, (i + 1) * rows)
            builder.add_slot(f"{name}.weight", (rows, cols), self.weight[span])
            if self.bias is not None:
                builder.add_slot(f"{name}.bias", (rows,), self.bias[span])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _LayerNorm:
    def __init__(self, builder: WeightBuilder, name: str, size: int, eps: float) -> None:
        self.weight = builder.param(f"{name}.weight", size)
        self.bias = builder.param(f"{name}.bias", size)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _TowerLayer:
    """Pre-norm attention over one tile, then an MLP with the exact GELU."""

    def __init__(self, builder: WeightBuilder, name: str, config: VisionConfig) -> None:
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = _LayerNorm(builder, f"{name}.input_layernorm", width, config.norm_eps)
        self.norm2 = _LayerNorm(builder, f"{name}.post_attention_layernorm", width, config.norm_eps)
        names = tuple(f"{name}.self_attn.{letter}_proj" for letter in "qkv")
        self.qkv = _Affine(builder, names, width, width)
        self.o = _Affine(builder, (f"{name}.self_attn.o_proj",), width, width)
        self.fc1 = _Affine(builder, (f"{name}.mlp.fc1",), config.intermediate_size, width)
        self.fc2 = _Affine(builder, (f"{name}.mlp.fc2",), width, config.intermediate_size)

    def __call__(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """``x[N, P, C]``; ``turns`` complex64 ``[P, D/2]``."""
        qkv = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(qkv[:2], turns)
        out = F.scaled_dot_product_attention(q, k, qkv[2])
        x = x + self.o(out.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionEncoder:
    """Tower, adapter and projector."""

    def __init__(self, builder: WeightBuilder, config: VisionConfig, hidden_size: int) -> None:
        width, name = config.hidden_size, "vision_model"
        side = config.image_size // config.patch_size
        self.config = config
        self.dtype = builder.dtype
        self.patch = _Affine(
            builder,
            (f"{name}.patch_embedding.linear",),
            width,
            config.num_channels * config.patch_size**2,
            bias=False,
        )
        self.class_embedding = builder.param(f"{name}.class_embedding", width)
        self.positions = builder.param(f"{name}.positional_embedding_vlm", side**2 + 1, width)
        self.norm_pre = _LayerNorm(builder, f"{name}.layernorm_pre", width, config.norm_eps)
        self.norm_post = _LayerNorm(builder, f"{name}.layernorm_post", width, config.norm_eps)
        self.layers = [
            _TowerLayer(builder, f"{name}.model.layers.{i}", config) for i in range(config.num_layers)
        ]
        shuffled = int(width / config.pixel_shuffle_ratio**2)
        mid, out = config.projector_input_dim, config.projector_output_dim
        self.fc1 = _Affine(builder, (f"{name}.vision_adapter.mlp.fc1",), mid, shuffled, bias=False)
        self.fc2 = _Affine(builder, (f"{name}.vision_adapter.mlp.fc2",), out, mid, bias=False)
        self.projector = _Affine(builder, ("multi_modal_projector.linear_1",), hidden_size, out, bias=False)
        self.turns = tower_turns(config, builder.device)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """``pixels[N, 3, size, size]`` (normalised) to projected features ``[R, M]`` in the model dtype."""
        return self.projector(self.features(pixels)).flatten(0, 1)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[N, tokens_per_tile, projector_output_dim]``: the adapter's output, before the projector."""
        size = self.config.patch_size
        # Unfold lists a patch as (channel, row, column) and the patches row by row.
        patches = F.unfold(pixels.to(self.dtype), size, stride=size).transpose(1, 2)
        x = self.patch(patches)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = self.norm_pre(torch.cat((x, class_token), dim=1) + self.positions)
        for layer in self.layers:
            x = layer(x, self.turns)
        x = pixel_shuffle(self.norm_post(x)[:, :-1], self.config.pixel_shuffle_ratio)
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


def tower_turns(config: VisionConfig, device: torch.device) -> torch.Tensor:
    """complex64 ``[P, D/2]``: the first half of the pairs turns with column + 1, the second with row + 1.

    The class token, last, is not turned. Computed on the CPU, as ``layers.rope_frequencies`` is.
    """
    side = config.image_size // config.patch_size
    freq_dim = config.hidden_size // config.num_heads // 2
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, freq_dim, 2).float() / freq_dim)
    places = torch.arange(side**2)
    by_column = (places % side + 1)[:, None] * freqs
    by_row = (places // side + 1)[:, None] * freqs
    angles = F.pad(torch.cat((by_column, by_row), dim=1), (0, 0, 0, 1))
    return torch.polar(torch.ones_like(angles), angles).to(device)


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn adjacent pairs of ``x[…, P, D]`` in float32; the result has the dtype of ``x``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def pixel_shuffle(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """``[N, side², C]`` to ``[N, side² ratio², C / ratio²]``: squares of patches become channels, row offset first."""
    step = round(1 / ratio)
    side = round(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side // step, step, side // step, step, -1)  # [N, rows, dr, columns, dc, C]
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
