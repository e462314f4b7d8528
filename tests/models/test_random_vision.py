"""Random tiny vision towers of other shapes, with several images in one prompt, against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from outrider.models.config_hf import load_model_config
from outrider.models.llama4 import Llama4
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.runner.batch import ImageBatch
from tests.models.paged_driver import PagedDriver, relative_rms
from tests.models.test_random_models import LLAMA4

IMAGE, START, END = 90, 91, 92
CPU = torch.device("cpu")
# heads, head dim, patches a side, pixels of a patch, tiles of each image
SHAPES = {
    "one head": (1, 16, 2, 14, (1,)),
    "three small heads": (3, 8, 6, 4, (1, 3)),
    "five heads, three images": (5, 4, 4, 7, (3, 1, 5)),
}


def _reference(shape: str) -> tuple[Any, list[int], torch.Tensor]:
    """A random model, a prompt with images, and the pixels of all tiles."""
    heads, head_dim, side, patch, tiles = SHAPES[shape]
    width, size = heads * head_dim, side * patch
    vision = {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "image_size": size, "patch_size": patch, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 24,
        "projector_output_dim": 24, "vision_output_dim": 24,
    }  # fmt: skip
    config = Llama4Config(
        vision_config=vision,
        text_config=LLAMA4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    model = Llama4ForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(weight, mean=mean, std=0.3)
    ids = [5]
    for count in tiles:
        ids += [START, *[IMAGE] * (count * (side // 2) ** 2), END, 7]
    return model, [*ids, 11], torch.randn(sum(tiles), 3, size, size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [8, 200])
def test_images(shape: str, chunk: int, tmp_path: Path) -> None:
    """Guards head sizes, the two-dimensional rope and tile sizes that the one fixture does not have."""
    reference, ids, pixels = _reference(shape)
    patches = [i for i, token in enumerate(ids) if token == IMAGE]
    with torch.inference_mode():
        features = reference.vision_model(pixels).last_hidden_state.flatten(0, -2)
        hidden = reference.get_input_embeddings()(torch.tensor([ids])).clone()
        hidden[0, patches] = reference.multi_modal_projector(features)
        wanted = reference.language_model(inputs_embeds=hidden).logits[0, -1]
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "kv_cache_dtype": torch.float32}
    model = load_model(load_model_config(tmp_path), tmp_path, Parallel(), **options)
    assert isinstance(model, Llama4)
    rows = model.encode_images(pixels)
    assert len(rows) == len(patches)
    driver = PagedDriver(model)
    for start in range(0, len(ids), chunk):
        inside = [k for k, i in enumerate(patches) if start <= i < start + chunk]
        places = torch.tensor([patches[k] - start for k in inside], dtype=torch.int64)
        images = ImageBatch(rows[inside], places) if inside else None
        logits = driver.step([(0, ids[start : start + chunk])], images)[0]
    assert relative_rms(logits, wanted) < 1e-4
