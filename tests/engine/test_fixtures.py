"""The whole engine against what transformers computed for the tiny Llama 4: prompts together, in chunks, then decode.

``tests/models`` compares the model alone; here scheduler, KV manager, runner, sampler and image store are in between.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from outrider.config import EngineConfig
from outrider.models.config_hf import load_model_config
from outrider.runner.setup import build_engine
from outrider.text.images import ImageProcessor
from outrider.text.tokenizer import Tokenizer
from outrider.types import Request, SamplingParams, TokenEvent

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TINY = SHARED / "fixtures" / "llama4-tiny-a"
VOCABULARY = 1024
CHUNK = 13  # tokens a step: no divisor of the attention chunk (32) or of the block size

if not TINY.is_dir():
    pytest.skip(f"no {TINY}: set OUTRIDER_SHARED", allow_module_level=True)

REFERENCES: dict[str, Any] = json.loads((TINY / "refs.json").read_text())


def _reference(name: str) -> torch.Tensor:
    with safe_open(str(TINY / "refs.safetensors"), "pt") as file:
        return file.get_tensor(name)


def _serve(folder: str, requests: list[Request], **settings: Any) -> dict[str, list[TokenEvent]]:
    """Events of every request, all submitted at once."""
    config = EngineConfig(
        model=str(TINY / folder), device="cpu", max_model_len=256, max_num_seqs=CHUNK, max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=1 << 26, **settings,
    )  # fmt: skip
    engine, _ = build_engine(config, lambda *_: None)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    try:
        for request in requests:
            assert not engine.add(request)
        while engine.has_work:
            for event in engine.step():
                assert event.finish_reason != "error", event.error
                events[event.request_id].append(event)
    finally:
        engine.shutdown()
    return events


def _request(name: str, ids: list[int], **more: Any) -> Request:
    """24 greedy tokens with the log-probability of every token of the vocabulary, as the references have them."""
    sampling = SamplingParams(max_tokens=24, temperature=0.0, logprobs=VOCABULARY, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=ids, sampling=sampling, **more)


def _check(mode: str, index: int, events: list[TokenEvent], tolerance: float, margin: float) -> None:
    """The first step's distribution, and the greedy ids up to the reference's first step closer than ``margin``."""
    entry = next(entry for event in events for entry in event.logprobs or [])
    found = torch.empty(VOCABULARY)
    found[torch.tensor(entry.top_ids)] = torch.tensor(entry.top_logprobs)
    wanted = _reference(f"{mode}/p{index}/last_logits").log_softmax(-1)
    # The reference's logits have a standard deviation of 8, and the README's tolerances are relative to them.
    scale = _reference(f"{mode}/p{index}/last_logits").norm()
    assert float((found - wanted).norm() / scale) <= tolerance
    ids = [token for event in events for token in event.token_ids]
    reference = REFERENCES["modes"][mode][index]
    close = [i for i, gap in enumerate(reference["greedy_margins"]) if gap < margin]
    count = close[0] if close else len(ids)
    assert len(ids) == 24 and ids[:count] == reference["greedy"][:count]


@pytest.mark.parametrize(
    ("mode", "folder", "settings", "tolerance", "margin"),
    [
        ("bf16_f32", "bf16", {"dtype": "float32"}, 1e-3, 0.01),
        ("bf16_f32", "bf16", {"dtype": "bfloat16"}, 0.03, 1.5),
        ("fp8_w8a8_kv8", "fp8", {"kv_cache_dtype": "fp8", "dtype": "float32"}, 0.2, 2.0),
        ("nvfp4_w4a16", "nvfp4", {"kv_cache_dtype": "float32", "dtype": "float32"}, 1e-3, 0.01),
        ("nvfp4_w4a16_kv8", "nvfp4", {"dtype": "float32"}, 0.05, 1.0),
    ],
)
def test_text(mode: str, folder: str, settings: dict[str, Any], tolerance: float, margin: float) -> None:
    """Guards the six prompts of the fixtures, computed in company, through the checkpoint's own settings."""
    requests = [_request(f"p{i}", ids) for i, ids in enumerate(REFERENCES["prompts"])]
    events = _serve(folder, requests, **settings)
    for i, request in enumerate(requests):
        _check(mode, i, events[request.request_id], tolerance, margin)


def test_images() -> None:
    """Guards three image files from their bytes to the answer: tiles, tower, rows, cuts through an image."""
    tokenizer = Tokenizer.load(TINY / "bf16")
    config = load_model_config(TINY / "bf16")
    processor = ImageProcessor.load(TINY / "bf16", config, tokenizer.special_tokens)
    assert processor is not None
    requests = []
    for i, facts in enumerate(REFERENCES["images"]):
        ids = facts["prompt"]
        start, end = ids.index(processor.tokens.start), ids.index(processor.tokens.end)
        image = processor.process((TINY / facts["file"]).read_bytes())
        short = [*ids[:start], processor.tokens.image, *ids[end + 1 :]]
        prompt, inputs = processor.expand(short, [image])
        assert prompt == ids
        requests.append(_request(f"p{i}", prompt, images=inputs))
    events = _serve("bf16", requests, dtype="float32")
    for i, request in enumerate(requests):
        _check("mm_bf16_f32", i, events[request.request_id], 1e-2, 0.1)
