"""Config files in every spelling give one ``ModelConfig``; contradictions are refused in one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4Config, Llama4TextConfig, LlamaConfig

from outrider.errors import ConfigError
from outrider.models.config_hf import check_quantization, load_model_config, parse_hf_config
from tests.models.references import References


def _raw(references: References, folder: str = "bf16") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((references.folder / folder / "config.json").read_text())
    return value


def test_new_spelling_is_the_same(references: References, tmp_path: Path) -> None:
    """Guards rope_parameters, dtype, layer_types and moe_layers: what transformers rewrites means the same."""
    Llama4Config.from_pretrained(references.folder / "bf16").save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten["text_config"] and "layer_types" in rewritten["text_config"]
    rewritten["architectures"] = ["Llama4ForConditionalGeneration"]
    assert parse_hf_config(rewritten) == parse_hf_config(_raw(references))


def test_flat_text_config(references: References) -> None:
    """Guards text-only checkpoints, whose config has no text_config."""
    raw = _raw(references)
    nested = parse_hf_config(raw)
    flat = parse_hf_config({"architectures": ["Llama4ForCausalLM"], **raw["text_config"]})
    for name in ("rope_layers", "moe_layers", "rope_scaling", "floor_scale", "eos_token_ids", "head_dim"):
        assert getattr(flat, name) == getattr(nested, name)
    assert flat.vision is None


def test_architecture_from_the_model_type(references: References) -> None:
    """Guards configs that transformers wrote without a model, which name no architecture."""
    raw = _raw(references)
    wanted = parse_hf_config(raw)
    del raw["architectures"]
    assert parse_hf_config(raw) == wanted
    assert parse_hf_config(raw["text_config"]).architecture == "Llama4ForCausalLM"
    assert parse_hf_config({"model_type": "llama"}).architecture == "LlamaForCausalLM"


def test_defaults_are_those_of_transformers() -> None:
    """Guards keys that a file may leave out."""
    ours = parse_hf_config({"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"})
    theirs = Llama4TextConfig()
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads) == (48, 40, 8)
    assert ours.rope_layers == tuple(bool(x) for x in theirs.no_rope_layers)
    assert [i for i, flag in enumerate(ours.moe_layers) if flag] == theirs.moe_layers
    assert ours.attention_chunk_size == theirs.attention_chunk_size
    assert (ours.floor_scale, ours.attn_scale) == (theirs.floor_scale, theirs.attn_scale)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.use_qk_norm is theirs.use_qk_norm
    dense, wanted = parse_hf_config({"architectures": ["LlamaForCausalLM"]}), LlamaConfig()
    for name in (
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "head_dim",
        "attention_bias",
    ):
        assert getattr(dense, name) == getattr(wanted, name), name
    seeing = {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": {"patch_size": 14}}
    images, whole = parse_hf_config(seeing), Llama4Config()
    assert images.image_token_id == whole.image_token_index
    assert (images.boi_token_id, images.eoi_token_id) == (whole.boi_token_index, whole.eoi_token_index)


def test_temperature_tuning_as_an_integer(references: References) -> None:
    """Guards early files, where the flag is the integer 4."""
    raw = _raw(references)
    for value, wanted in ((4, True), (0, False), (True, True), (False, False)):
        raw["text_config"]["attn_temperature_tuning"] = value
        assert parse_hf_config(raw).attn_temperature_tuning is wanted


def test_generation_config(references: References) -> None:
    """Guards the stop ids: generation_config's first, then those that only config.json has."""
    config = parse_hf_config(
        _raw(references), generation={"eos_token_id": [7, 993], "top_p": 0.5, "max_length": 20}
    )
    assert config.eos_token_ids == (7, 993, 999, 1000)
    assert config.generation == {"top_p": 0.5}


@pytest.mark.parametrize("folder", ["fp8", "nvfp4"])
def test_both_quantization_files_agree(references: References, folder: str) -> None:
    """Guards old exports, which have only hf_quant_config.json, in either case of letters."""
    raw = _raw(references, folder)
    raw.pop("quantization_config", None)
    hf_quant = json.loads((references.folder / folder / "hf_quant_config.json").read_text())
    hf_quant["quantization"]["quant_algo"] = hf_quant["quantization"]["quant_algo"].lower()
    config = load_model_config(references.folder / folder)
    assert parse_hf_config(raw, hf_quant=hf_quant).quant == config.quant
    assert config.quant is not None and config.quant.kv_cache_algo == "FP8"


def test_quantization_flag(references: References) -> None:
    """Guards the agreement of --quantization with the checkpoint."""
    flags = {"bf16": None, "fp8": "modelopt", "nvfp4": "modelopt_fp4"}
    for folder, right in flags.items():
        config = references.config(folder)
        check_quantization(None, config)
        for flag in ("modelopt", "ModelOpt_FP4"):
            if flag.lower() == right:
                check_quantization(flag, config)
            else:
                with pytest.raises(ConfigError, match="checkpoint holds"):
                    check_quantization(flag, config)
        with pytest.raises(ConfigError, match="not known"):
            check_quantization("awq", config)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "short list": ({"no_rope_layers": [1, 0]}, "8 entries"),
    "layer_types": ({"layer_types": ["full_attention"] * 8}, "disagree"),
    "moe_layers": ({"moe_layers": [8]}, "below 8"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu"),
    "rope type": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type yarn"),
    "rope key": ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(references: References, name: str) -> None:
    """Guards against serving what the file does not say."""
    changes, message = CONTRADICTIONS[name]
    raw = copy.deepcopy(_raw(references))
    raw["text_config"] |= changes
    with pytest.raises(ConfigError, match=message):
        parse_hf_config(raw)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    """Guards wrong paths: no file, no JSON, no object, an architecture that is not served."""
    for text, message in (
        (None, "has no config.json"),
        ("{", "not readable JSON"),
        ("[]", "one JSON object"),
        ('{"architectures": ["MixtralForCausalLM"]}', "MixtralForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq"}}', "awq"),
    ):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_model_config(tmp_path)
