"""The vision tower, the projector and image prompts against transformers."""

from __future__ import annotations

import pytest
import torch

from outrider.models.llama4 import Llama4
from outrider.runner.batch import ImageBatch
from tests.models.paged_driver import PagedDriver, relative_rms
from tests.models.references import References

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("image", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 0.03)])
def test_features(references: References, image: int, dtype: torch.dtype, tolerance: float) -> None:
    """Guards the tower (before the projector) and the rows that enter the decoder."""
    model = references.model("bf16", dtype)
    assert isinstance(model, Llama4) and model.vision is not None
    pixels = references.tensor(f"mm/p{image}/pixel_values")
    features = model.vision.features(pixels).float()
    assert relative_rms(features, references.tensor(f"mm/p{image}/vision_features")) < tolerance
    rows = model.encode_images(pixels).float()
    assert relative_rms(rows, references.tensor(f"mm/p{image}/projected")) < tolerance


@pytest.mark.parametrize("image", [0, 1, 2])
@pytest.mark.parametrize("chunk", [100, 9])
def test_image_prompt(references: References, image: int, chunk: int) -> None:
    """Guards the placing of feature rows, also where a chunk of the prefill cuts through an image."""
    model = references.model("bf16", F32)
    assert isinstance(model, Llama4)
    prompt: list[int] = references.values["images"][image]["prompt"]
    rows = model.encode_images(references.tensor(f"mm/p{image}/pixel_values"))
    patches = [i for i, token in enumerate(prompt) if token == model.config.image_token_id]
    assert len(patches) == len(rows)
    driver = PagedDriver(model)
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        inside = [k for k, i in enumerate(patches) if start <= i < start + chunk]
        token_idx = torch.tensor([patches[k] - start for k in inside], dtype=torch.int64)
        images = ImageBatch(rows[inside], token_idx) if inside else None
        logits = driver.step([(0, part)], images)[0]
    assert relative_rms(logits, references.tensor(f"mm_bf16_f32/p{image}/last_logits")) < 1e-3


def test_language_model_only(references: References) -> None:
    """Guards --language-model-only: the tower is neither allocated nor called left over."""
    whole, text = references.model("bf16", BF16), references.model("bf16", BF16, language_model_only=True)
    assert isinstance(text, Llama4) and text.vision is None
    assert text.weight_bytes() < whole.weight_bytes()
