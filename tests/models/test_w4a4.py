"""NVFP4 in four-bit arithmetic, as Blackwell runs it, against what ModelOpt's formula gave: here in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider.errors import CheckpointError
from outrider.kernels import nvfp4, op_table
from outrider.kernels.norm import Normed, summed
from outrider.kernels.nvfp4 import Nvfp4Path
from outrider.kernels.w4a4 import Fp4Weight
from outrider.models.decoder import Decoder
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.quant import experts, linear
from tests.models.paged_driver import PagedDriver, relative_rms
from tests.models.references import CPU, References

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the path of a GPU with FP4 tensor cores; its operations take their references on a CPU."""
    for module in (linear, experts):
        monkeypatch.setattr(module, "nvfp4_path", lambda _: Nvfp4Path.W4A4)


def _layer0_error(references: References, model: Decoder, mode: str, kv_dtype: torch.dtype) -> float:
    driver = PagedDriver(model, kv_dtype=kv_dtype)
    batch = driver.batch([(0, references.prompts[3])])
    x, residual = model.layers[0](model.embed_batch(batch), None, batch, driver.kv)
    return relative_rms(summed(x) + residual, references.tensor(f"{mode}/p3/hidden_after_layer0"))


# In float32 the arithmetic is the reference's own; the room is for sums in another order that flip a rounding.
@pytest.mark.parametrize(
    ("mode", "dtype", "kv_dtype", "layer0", "logits"),
    [
        ("nvfp4_w4a4", F32, F32, 0.01, 0.2),
        ("nvfp4_w4a4_kv8", F32, FP8, 0.01, 0.2),
        ("nvfp4_w4a4_kv8", BF16, FP8, 0.15, 0.5),
    ],
)
def test_against_references(
    references: References, mode: str, dtype: torch.dtype, kv_dtype: torch.dtype, layer0: float, logits: float
) -> None:
    """Guards activation scales and their rounding: layer 0 tightly, logits within the fixtures' tolerance."""
    model = references.model("nvfp4", dtype, kv_dtype)
    assert _layer0_error(references, model, mode, kv_dtype) <= layer0
    prompts = list(range(len(references.prompts)))
    assert references.worst_error(model, mode, kv_dtype, prompts) <= logits


def _with_input_scales(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    for module, name in ((linear, "w4a4_linear"), (experts, "moe_w4a4")):
        op = getattr(module, name)

        def changed(*args: Any, op: Any = op) -> torch.Tensor:
            weights = (change(a) if isinstance(a, Fp4Weight) else a for a in args)
            return op(*weights)  # type: ignore[no-any-return]

        monkeypatch.setattr(module, name, changed)


MISTAKES: dict[str, Any] = {
    "input_scale as a reciprocal": lambda w: replace(w, input_scale=1 / w.input_scale),
    "input_scale of one": lambda w: replace(w, input_scale=torch.ones_like(w.input_scale)),
    "input_scale as amax / 448": lambda w: replace(
        w, input_scale=6 * w.input_scale, global_scale=w.global_scale / 6
    ),
    "weight_scale_2 left out": lambda w: replace(w, global_scale=torch.ones_like(w.global_scale)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(references: References, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """Guards the tolerance on layer 0, which each misreading of the scales breaks."""
    _with_input_scales(monkeypatch, MISTAKES[mistake])
    assert _layer0_error(references, references.model("nvfp4", F32), "nvfp4_w4a4", F32) > 0.02


def test_weight_only_is_another_function(references: References, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against activations that stay wide: the reference without their rounding is far off."""
    for module in (linear, experts):
        monkeypatch.setattr(module, "nvfp4_path", lambda _: Nvfp4Path.WEIGHT_ONLY)
    assert _layer0_error(references, references.model("nvfp4", F32), "nvfp4_w4a4", F32) > 0.02


def test_shards_agree(references: References) -> None:
    """Guards the split of packed weights: ranks of two, added up, give one rank's layer within rounding."""
    prompt = references.prompts[4]
    model = references.model("nvfp4", F32)
    whole = model.layers[0].feed_forward
    x = Normed(torch.randn(len(prompt), model.config.hidden_size), None)
    parts = []
    for rank in range(2):
        parallel = Parallel(tp_rank=rank, tp_size=2)
        parts.append(summed(references.model("nvfp4", F32, parallel=parallel).layers[0].feed_forward(x)))
    assert relative_rms(sum(parts[1:], parts[0]), summed(whole(x))) < 0.01


def test_dummy_weights_run(references: References) -> None:
    """Guards the scales of ``--load-format dummy``: four-bit activations neither vanish nor saturate."""
    options: dict[str, Any] = {"load_format": "dummy", "dtype": F32, "device": CPU, "kv_cache_dtype": FP8}
    logits = []
    for path in (Nvfp4Path.W4A4, Nvfp4Path.WEIGHT_ONLY):
        with pytest.MonkeyPatch.context() as monkeypatch:
            for module in (linear, experts):
                monkeypatch.setattr(module, "nvfp4_path", lambda _, path=path: path)
            model = load_model(references.config("nvfp4"), "/nowhere", Parallel(), **options)
        logits.append(PagedDriver(model, kv_dtype=FP8).prefill(references.prompts[4], 70))
    assert bool(logits[0].isfinite().all())
    assert relative_rms(logits[0], logits[1]) < 1.0  # of the same size; unrelated logits are 1.4 apart


def test_depth_that_the_kernels_cannot_read(references: References) -> None:
    """Guards the refusal: a rank's 16 of 64 inner features start between two 16-byte words."""
    with pytest.raises(CheckpointError, match=r"down_proj.* has 16 in features on each rank.*multiple of 32"):
        references.model("nvfp4", F32, parallel=Parallel(tp_size=4))


@pytest.mark.parametrize(
    ("capability", "path"),
    [((8, 9), "WEIGHT_ONLY"), ((9, 0), "FP8"), ((10, 0), "W4A4"), ((10, 3), "W4A4"), ((12, 0), "W4A4")],
)
def test_path_of_a_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], path: str) -> None:
    """Guards the choice and that the start-up line's table says it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda")
    assert nvfp4.nvfp4_path(device).name == path
    shown = op_table(device)["nvfp4"]
    assert shown.startswith("w4a4" if path == "W4A4" else "weight-only")
    assert op_table(torch.device("cpu"))["nvfp4"].startswith("weight-only")
