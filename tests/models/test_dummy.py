"""Dummy weights and the memory plan: the shapes of real checkpoints, from their config alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider.errors import ConfigError
from outrider.kernels import router
from outrider.kernels.moe import route_reference
from outrider.models.config import ModelConfig
from outrider.models.memory import GIB, check_fits, kv_bytes, weight_bytes
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.quant.ignore_list import is_ignored
from tests.models.paged_driver import PagedDriver
from tests.models.references import CPU, References

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def _dummy(config: ModelConfig, dtype: torch.dtype) -> Any:
    return load_model(
        config, "/nowhere", Parallel(), load_format="dummy", dtype=dtype, device=CPU, kv_cache_dtype=FP8
    )


@pytest.mark.parametrize("folder", ["bf16", "fp8", "nvfp4"])
def test_dummy_has_the_checkpoints_size(references: References, folder: str) -> None:
    """Guards the memory plan: what it predicts, what the dummy takes and what the checkpoint takes are one number."""
    config = references.config(folder)
    loaded = references.model(folder, BF16).weight_bytes()
    assert weight_bytes(config, Parallel(), BF16) == loaded == _dummy(config, BF16).weight_bytes()
    table = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    assert weight_bytes(config, Parallel(), BF16, tables_apart=True) == loaded - table


@pytest.mark.parametrize("folder", ["bf16", "fp8", "nvfp4"])
def test_dummy_runs(references: References, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against zeros, NaN codes and collapsed routers: finite varied logits, every expert chosen."""
    chosen: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scores = route_reference(logits, top_k)
        chosen.append(ids[:, 0])
        return ids, scores

    monkeypatch.setattr(router, "route_reference", spy)
    config = replace(references.config(folder), hidden_size=256, num_experts=8)
    model = _dummy(config, F32)
    ids = torch.randint(0, config.vocab_size, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = PagedDriver(model, kv_dtype=FP8).prefill(ids, 120)
    assert bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10
    for layer in chosen:
        shares = torch.bincount(layer.long(), minlength=8) / len(layer)
        assert float(shares.max()) < 0.5
        assert int((shares > 0).sum()) >= 6


def test_dummy_is_repeatable(references: References) -> None:
    """Guards restarts and ranks: the same config gives the same weights."""
    config = references.config("fp8")
    logits = [PagedDriver(_dummy(config, F32), kv_dtype=FP8).prefill([5, 6, 7], 3) for _ in range(2)]
    assert torch.equal(logits[0], logits[1])


def test_ignore_list(references: References) -> None:
    """Guards the list's notations: prefixed and bare names, globs, and names that only look alike."""
    quant = references.config("fp8").quant
    assert quant is not None
    assert is_ignored("layers.3.feed_forward.router", quant.ignore)
    assert not is_ignored("layers.3.feed_forward.experts.gate_up_proj", quant.ignore)
    assert is_ignored("vision_model.model.layers.0.mlp.fc1", quant.ignore)
    old = ("*router*", "self_attn", "model.layers.1.feed_forward.shared_expert*")
    assert is_ignored("layers.7.feed_forward.router", old)
    assert is_ignored("layers.7.self_attn.q_proj", old)
    assert is_ignored("layers.1.feed_forward.shared_expert.up_proj", old)
    assert not is_ignored("layers.11.feed_forward.shared_expert.up_proj", old)


def test_a_wrong_list_is_reported(references: References, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against silence: the right list says nothing, a list that names o_proj is reported, tensors decide."""
    config = references.config("fp8")
    assert config.quant is not None
    right = references.model("fp8", F32)
    assert not caplog.records
    quant = replace(config.quant, ignore=(*config.quant.ignore, "*.o_proj"))
    other = references.model("fp8", F32, config=replace(config, quant=quant))
    assert "8 tensors are stored otherwise" in caplog.text
    prompt = references.prompts[1]
    assert torch.equal(PagedDriver(right).prefill(prompt, 9), PagedDriver(other).prefill(prompt, 9))


def test_kv_bytes(references: References) -> None:
    """Guards the plan of long contexts: 6 chunked layers keep 32 tokens, 2 global layers keep all."""
    config = references.config("bf16")
    one = 2 * config.num_kv_heads * config.head_dim
    assert kv_bytes(config, Parallel(), FP8, 20) == 8 * 20 * one
    assert kv_bytes(config, Parallel(), FP8, 1000) == (6 * 32 + 2 * 1000) * one
    assert kv_bytes(config, Parallel(tp_size=2), BF16, 20) == 8 * 20 * one


def test_refusal_names_settings_that_fit(references: References) -> None:
    """Guards the advice: following it leads to a plan that is accepted."""
    config = references.config("bf16")
    weights = weight_bytes(config, Parallel(), BF16)
    usable = weights + 3_000_000
    options: dict[str, Any] = {"dtype": BF16, "kv_dtype": BF16, "usable_bytes": usable}
    with pytest.raises(ConfigError, match="does not fit") as refusal:
        check_fits(config, Parallel(), max_model_len=4096, **options)
    text = str(refusal.value)
    length = re.search(r"--max-model-len (\d+)", text)
    assert length is not None
    assert check_fits(config, Parallel(), max_model_len=int(length[1]), **options).total_bytes <= usable
    with pytest.raises(ConfigError):
        check_fits(config, Parallel(), max_model_len=int(length[1]) + 1, **options)
    assert "--kv-cache-dtype fp8" in text and "--tensor-parallel-size 2" in text
    check_fits(config, Parallel(), max_model_len=4096, **options | {"kv_dtype": FP8})


def test_scout_at_full_size() -> None:
    """Guards the numbers people buy GPUs by: Scout's weights, counted from the published dimensions."""
    config = ModelConfig(
        architecture="Llama4ForCausalLM", vocab_size=202048, hidden_size=5120, num_layers=48, num_heads=40,
        num_kv_heads=8, head_dim=128, intermediate_size=8192, rms_norm_eps=1e-5, rope_theta=5e5,
        max_position_embeddings=10485760, dtype="bfloat16", num_experts=16, attention_chunk_size=8192,
        rope_layers=tuple((i + 1) % 4 != 0 for i in range(48)), moe_layers=(True,) * 48, interleaved_rope=True,
    )  # fmt: skip
    attention = 5120 * 128 * (40 + 8 + 8 + 40)
    experts = 17 * 3 * 5120 * 8192
    layer = attention + experts + 16 * 5120 + 2 * 5120
    total = 48 * layer + 2 * 202048 * 5120 + 5120
    assert weight_bytes(config, Parallel(), BF16) == 2 * total
    halves = [weight_bytes(config, Parallel(tp_rank=r, tp_size=2), BF16) for r in range(2)]
    replicated = 48 * (16 * 5120 + 2 * 5120) + 5120
    assert sum(halves) == 2 * (total + replicated)
    assert 200 * GIB < 2 * total < 205 * GIB
