"""Checkpoints in other layouts load to the same model; damaged ones are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import CheckpointError
from outrider.models.config_hf import load_model_config
from outrider.models.decoder import Decoder
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from tests.models.paged_driver import PagedDriver
from tests.models.references import References

F32 = torch.float32
Tensors = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.2"


def _read(folder: Path) -> Tensors:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def _write(source: Path, folder: Path, tensors: Tensors) -> None:
    """A copy of the checkpoint ``source`` that holds ``tensors`` in one shard."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "hf_quant_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def _load(folder: Path) -> Decoder:
    return load_model(
        load_model_config(folder), folder, Parallel(), dtype=F32, device=torch.device("cpu"), kv_cache_dtype=F32
    )  # fmt: skip


def _logits(model: Decoder, references: References) -> torch.Tensor:
    return PagedDriver(model).prefill(references.prompts[2], 16)


def _text_only_names(tensors: Tensors) -> Tensors:
    return {k.removeprefix("language_model."): v for k, v in tensors.items()}


def _new_names(tensors: Tensors) -> Tensors:
    """The prefixes of transformers 5: ``model.language_model.`` and ``model.vision_model.``."""
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        renamed[f"model.{new}" if new.startswith(("vision_model", "multi_modal")) else new] = value
    return renamed


def _per_expert(tensors: Tensors) -> Tensors:
    """``experts.{e}.gate_proj.weight`` and so on instead of the fused tensors."""
    out: Tensors = {}
    for name, value in tensors.items():
        stem, _, last = name.partition(".experts.")
        if not last:
            out[name] = value
            continue
        projection = "gate_up_proj" if last.startswith("gate_up_proj") else "down_proj"
        suffix = last.removeprefix(projection).removeprefix("_") or "weight"
        for expert in range(4):
            mine = value if value.dim() == 0 else value[expert].t()
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            halves = mine.chunk(len(names)) if mine.dim() else (mine,) * len(names)
            for part, half in zip(names, halves, strict=True):
                out[f"{stem}.experts.{expert}.{part}.{suffix}"] = half.clone()
    return out


def _one_element_scales(tensors: Tensors) -> Tensors:
    return {k: v.reshape(1) if v.dim() == 0 else v for k, v in tensors.items()}


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "text-only names": _text_only_names,
    "new names": _new_names,
    "per-expert tensors": _per_expert,
    "scales of shape [1]": _one_element_scales,
}


@pytest.mark.parametrize("folder", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_equal(references: References, tmp_path: Path, folder: str, layout: str) -> None:
    """Guards names and orientations: the same numbers stored otherwise give the same bits."""
    source = references.folder / folder
    _write(source, tmp_path / "other", LAYOUTS[layout](_read(source)))
    assert torch.equal(_logits(_load(source), references), _logits(_load(tmp_path / "other"), references))


def test_unequal_nvfp4_scales(references: References, tmp_path: Path) -> None:
    """Guards an exporter that gives q, k and v scales of their own: k's doubled, its blocks halved, is the same."""
    source = references.folder / "nvfp4"
    tensors = _read(source)
    name = f"{LAYER}.self_attn.k_proj"
    tensors[f"{name}.weight_scale_2"] *= 2
    halved = tensors[f"{name}.weight_scale"].float() / 2
    tensors[f"{name}.weight_scale"] = halved.to(torch.float8_e4m3fn)
    assert torch.equal(tensors[f"{name}.weight_scale"].float(), halved)
    _write(source, tmp_path / "other", tensors)
    torch.testing.assert_close(
        _logits(_load(tmp_path / "other"), references), _logits(_load(source), references), atol=1e-3, rtol=1e-4
    )  # fmt: skip


def _drop(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.self_attn.q_proj.weight"]


def _misshape(tensors: Tensors) -> None:
    tensors[f"{LAYER}.feed_forward.router.weight"] = torch.zeros(5, 128)


def _add(tensors: Tensors) -> None:
    tensors[f"{LAYER}.self_attn.q_norm.weight"] = torch.zeros(64)


def _drop_scale(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.self_attn.k_proj.weight_scale"]


def _mix(tensors: Tensors) -> None:
    name = f"{LAYER}.self_attn.k_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)


def _odd_dtype(tensors: Tensors) -> None:
    tensors[f"{LAYER}.self_attn.o_proj.weight"] = torch.zeros(128, 256, dtype=torch.int32)


DAMAGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (
        _drop,
        r"Tensor language_model\.model\.layers\.2\.self_attn\.q_proj\.weight is missing.*\[256, 128\]",
    ),
    "shape": (
        _misshape,
        r"Tensor language_model\.model\.\S*\.router\.weight must have shape \[4, 128\]; the checkpoint has \[5, 128\]",
    ),
    "left over": (_add, r"holds language_model\.model\.\S*\.q_norm\.weight \[64\]"),
    "scale missing": (_drop_scale, r"k_proj\.weight_scale is missing"),
    "mixed formats": (_mix, r"one format.*k_proj\.weight is plain"),
    "odd dtype": (_odd_dtype, r"o_proj\.weight is stored as I32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(references: References, tmp_path: Path, damage: str) -> None:
    """Guards the refusal: the tensor, what was expected and what was found."""
    tensors = _read(references.folder / "fp8")
    change, message = DAMAGES[damage]
    change(tensors)
    _write(references.folder / "fp8", tmp_path / "bad", tensors)
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("weights", "metadata", "message"),
    [
        ("fp8", "nvfp4", r"_proj.* is FP8 \(F8_E4M3\), but .* announce NVFP4"),
        ("nvfp4", "fp8", r"_proj.* is NVFP4 \(U8\), but .* announce FP8"),
        ("nvfp4", "bf16", r"_proj.* is NVFP4 \(U8\), but .* announce no quantization"),
        ("bf16", "fp8", r"announces FP8 and holds no such weight \(tensor \S+_proj\S* is BF16"),
    ],
)
def test_weights_and_metadata_disagree(
    references: References, tmp_path: Path, weights: str, metadata: str, message: str
) -> None:
    """Guards against a --quantization that agrees with a file about the weights and not with the weights."""
    _write(references.folder / metadata, tmp_path / "bad", _read(references.folder / weights))
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path / "bad")


def test_layer_beyond_the_config(references: References) -> None:
    """Guards against silently serving the first layers of a longer checkpoint."""
    config = references.config("bf16")
    short = replace(
        config, num_layers=6, rope_layers=config.rope_layers[:6], moe_layers=config.moe_layers[:6]
    )
    with pytest.raises(CheckpointError, match=r"layers\.6"):
        references.model("bf16", F32, config=short)


def test_unfinished_downloads(references: References, tmp_path: Path) -> None:
    """Guards the files: one that the index names is absent, one is cut short, none is there."""
    source = references.folder / "bf16"
    config = load_model_config(source)

    def refuse(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_model(
                config, tmp_path, Parallel(), dtype=F32, device=torch.device("cpu"), kv_cache_dtype=F32
            )  # fmt: skip

    refuse("holds no .safetensors file")
    (tmp_path / "model.safetensors").write_bytes(
        (source / "model-00001-of-00003.safetensors").read_bytes()[:9000]
    )
    refuse("not a readable safetensors file")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse("names model-00002.safetensors, which is not there")
