"""Random tiny models of other shapes in FP8 and NVFP4 against transformers: exported here by ModelOpt's formulas.

Transformers runs the weights that the checkpoint stands for; for FP8 every quantized product also rounds its input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from outrider.kernels.nvfp4 import E2M1_VALUES
from outrider.models.config_hf import load_model_config
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from tests.models.paged_driver import PagedDriver, relative_rms

F32, FP8, CPU = torch.float32, torch.float8_e4m3fn, torch.device("cpu")
Tensors = dict[str, torch.Tensor]
PREFIXES = ("model.", "language_model.model.", "model.language_model.")

BASE = {
    "vocab_size": 113, "hidden_size": 48, "intermediate_size": 80, "intermediate_size_mlp": 112,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 24, "floor_scale": 8,
    "attn_scale": 0.3, "rms_norm_eps": 1e-5, "pad_token_id": 0, "max_position_embeddings": 512,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maverick": {"interleave_moe_layer_step": 2, "num_local_experts": 7, "use_qk_norm": False},
    "top-2 of 3 experts": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "explicit no_rope_layers": {"no_rope_layers": [0, 1, 0, 1], "num_attention_heads": 5, "num_key_value_heads": 5},
    "biases, tied": {"attention_bias": True, "tie_word_embeddings": True, "moe_layers": [2]},
}  # fmt: skip


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """What the checkpoint holds for a matrix or experts, and the weight that it stands for."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(FP8)
    return codes.float() * scale, {"": codes, "weight_scale": scale}


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """The same in e2m1 along the last dimension, a scale per 16 and one for all."""
    scale2 = weight.abs().max() / 2688
    blocks = weight.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / (6 * scale2)).clamp(2.0**-9, 448).to(FP8)
    step = (scale.float() * scale2)[..., None]
    table = torch.tensor(E2M1_VALUES)
    codes = ((blocks / step)[..., None] - table).abs().argmin(-1)
    values = (table[codes] * step).flatten(-2)
    nibbles = codes.flatten(-2).to(torch.uint8)
    packed = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return values, {"": packed, "weight_scale": scale, "weight_scale_2": scale2}


QUANTIZE: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, Tensors]]] = {"FP8": _fp8, "NVFP4": _nvfp4}


def _round_input(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(FP8).float() * scale


class _RoundedExperts(torch.nn.Module):
    """``Llama4TextExperts`` whose two inputs are rounded to FP8 where scales are given."""

    def __init__(self, experts: Any, scales: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        super().__init__()
        self.experts, self.scales = experts, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of all experts, one expert after the other."""
        x = x.view(self.experts.num_experts, -1, self.experts.hidden_size)
        if self.scales is not None:
            x = _round_input(x, self.scales[0])
        gate, up = (x @ self.experts.gate_up_proj).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        if self.scales is not None:
            hidden = _round_input(hidden, self.scales[1])
        return (hidden @ self.experts.down_proj).view(-1, self.experts.hidden_size)


def _export(model: Any, algo: str, per_expert: bool) -> Tensors:
    """Quantize ``model`` in place; give the checkpoint's tensors under the names of a text-only export."""
    quantize = QUANTIZE[algo]
    tensors = {name: p.data.clone() for name, p in model.named_parameters()}
    input_scale = torch.tensor(9.0 / 448 / (6 if algo == "NVFP4" else 1))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            module.weight.data, stored = quantize(module.weight.data)
            stored["weight"] = stored.pop("")
            tensors |= {f"{name}.{key}": value for key, value in stored.items()}
            tensors[f"{name}.input_scale"] = input_scale.clone()
            if algo == "FP8":
                module.register_forward_pre_hook(lambda _, args: (_round_input(args[0], input_scale),))
        elif isinstance(module, Llama4TextExperts):
            for projection in ("gate_up_proj", "down_proj"):
                weight = getattr(module, projection)
                values, stored = quantize(weight.data.transpose(1, 2).contiguous())
                weight.data = values.transpose(1, 2).contiguous()
                stored["input_scale"] = input_scale
                del tensors[f"{name}.{projection}"]
                tensors |= _name_experts(f"{name}.", projection, stored, per_expert)
            parent = model.get_submodule(name.removesuffix(".experts"))
            parent.experts = _RoundedExperts(module, (input_scale, input_scale) if algo == "FP8" else None)
    return tensors


def _name_experts(name: str, projection: str, stored: Tensors, per_expert: bool) -> Tensors:
    """Fused (input dimension before output dimension) or one by one (as linear layers are stored)."""
    out: Tensors = {}
    for key, value in stored.items():
        if not per_expert:
            tail = f"{projection}_{key}" if key else projection
            out[name + tail] = value.transpose(1, 2) if value.dim() else value
            continue
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for expert in range(stored[""].shape[0]):
            halves = value[expert].chunk(len(parts)) if value.dim() else (value,) * len(parts)
            for part, half in zip(parts, halves, strict=True):
                out[f"{name}{expert}.{part}.{key or 'weight'}"] = half
    return out


def _write(folder: Path, config: Llama4TextConfig, algo: str, tensors: Tensors, prefix: str) -> None:
    """Two shards without an index; scales 0-dim in one and [1] in the other; metadata in the older or newer file."""
    raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["Llama4ForCausalLM"]}
    ignore = ["lm_head", "model.layers.*.feed_forward.router", "model.embed_tokens"]
    if prefix == "model.":
        quantization = {"quant_algo": algo.lower(), "kv_cache_quant_algo": None, "exclude_modules": ignore}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    else:
        raw["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algo, "ignore": ignore}
    (folder / "config.json").write_text(json.dumps(raw))
    head = "language_model.lm_head." if prefix == "language_model.model." else "lm_head."
    shards: list[Tensors] = [{}, {}]
    for i, (name, value) in enumerate(tensors.items()):
        renamed = (
            name.replace("lm_head.", head).replace("model.", prefix, 1)
            if name.startswith("model.")
            else (name.replace("lm_head.", head))
        )
        shards[i % 2][renamed] = (
            (value.reshape(1) if i % 2 and value.dim() == 0 else value).clone().contiguous()
        )
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("algo", "tolerance"), [("FP8", 0.1), ("NVFP4", 1e-4)])
def test_quantized(variant: str, algo: str, tolerance: float, tmp_path: Path) -> None:
    """Guards every format's names, scales and orientation in shapes that the one fixture does not have."""
    config = Llama4TextConfig(**BASE | VARIANTS[variant])
    model = Llama4ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2)
    i = list(VARIANTS).index(variant)
    tensors = _export(model, algo, per_expert=i % 2 == 1)
    _write(tmp_path, config, algo, tensors, PREFIXES[i % 3])
    ids = torch.randint(1, config.vocab_size, (1, 60))
    with torch.inference_mode():
        wanted = model(ids).logits[0]
    driver = PagedDriver(
        load_model(
            load_model_config(tmp_path), tmp_path, Parallel(), dtype=F32, device=CPU, kv_cache_dtype=F32
        )
    )
    prompt: list[int] = ids[0].tolist()
    errors = [relative_rms(driver.prefill(prompt[:41], 11), wanted[40])]
    errors += [relative_rms(driver.step([(0, [prompt[i]])])[0], wanted[i]) for i in range(41, 60)]
    assert sorted(errors)[len(errors) // 2] < tolerance
