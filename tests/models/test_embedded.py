"""The embedded SmolLM2 GGUF: header against the gguf package, greedy ids and log-probabilities against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from outrider.errors import CheckpointError, ConfigError
from outrider.models.config_hf import load_model_config
from outrider.models.decoder import Decoder
from outrider.models.gguf import embedded_model_path, read_gguf_header
from outrider.models.loader_gguf import GgufFile
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from tests.models.paged_driver import PagedDriver


@pytest.fixture(scope="module")
def model() -> Decoder:
    path = embedded_model_path()
    return load_model(
        load_model_config(path), path, Parallel(),
        dtype=torch.float32, device=torch.device("cpu"), kv_cache_dtype=torch.float32,
    )  # fmt: skip


def test_header_agrees_with_the_gguf_package() -> None:
    """Guards the header reader: every key and every tensor's place."""
    metadata, tensors = read_gguf_header(embedded_model_path())
    reader = gguf.GGUFReader(str(embedded_model_path()))
    wanted = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert metadata.keys() == wanted.keys()
    small = [k for k in wanted if k not in ("tokenizer.ggml.merges", "tokenizer.ggml.tokens")]
    assert all(metadata[k] == wanted[k].contents() for k in small)
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        assert found.shape == tuple(tensor.shape[::-1].tolist())
        assert (found.offset, found.type_id) == (tensor.data_offset, int(tensor.tensor_type))


def test_sharded_read_is_a_slice() -> None:
    """Guards tensor parallelism on GGUF files: a part read is that part of the whole."""
    file, name = GgufFile(embedded_model_path()), "layers.3.mlp.down_proj.weight"
    whole = file.read(name, ())
    part = file.read(name, (slice(10, 30), slice(96, 200)))
    assert torch.equal(part, whole[10:30, 96:200])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_greedy(shared: Path, model: Decoder, index: int) -> None:
    """Guards the q/k layout, the tied head and the dequantisation: ids exact, log-probabilities within 1e-3."""
    values = json.loads((shared / "fixtures" / "smollm2_greedy.json").read_text())
    entry: dict[str, Any] = values["prompts"][index]
    driver = PagedDriver(model)
    logits = driver.prefill(entry["prompt_ids"], 5)
    logprobs = logits.log_softmax(-1)[entry["last_top5_ids"]]
    torch.testing.assert_close(logprobs, torch.tensor(entry["last_top5_logprobs"]), atol=1e-3, rtol=0)
    wanted = entry["greedy_ids"][:12]
    assert driver.greedy(logits, len(wanted)) == wanted


def test_damaged_files(tmp_path: Path) -> None:
    """Guards against a truncated download: one sentence, never a stack trace from struct."""
    data = embedded_model_path().read_bytes()[:3_000_000]
    whole_header, no_header, not_gguf = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"
    whole_header.write_bytes(data)
    no_header.write_bytes(data[:5000])
    not_gguf.write_bytes(b"GGML" + data[4:5000])
    with pytest.raises(CheckpointError, match="ends before tensor"):
        GgufFile(whole_header).read("layers.20.mlp.up_proj.weight", ())
    for path in (no_header, not_gguf):
        with pytest.raises(ConfigError, match="not a readable GGUF file"):
            load_model_config(path)
