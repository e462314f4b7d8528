"""``benchmarks.sweep`` and its floors: bytes and FLOPs counted twice, and a whole run on the tiny Llama 4."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sweep
from benchmarks.floors import ModelCost, Rates, Slice
from outrider.engine.kv_manager import KVManager
from outrider.engine.sequence import Sequence
from outrider.kv_layout import plan_layout
from outrider.models.config_hf import load_model_config, parse_hf_config
from outrider.types import Request, SamplingParams

H200 = Rates(bytes_per_s=4.28e12, linear_flops=1350e12, attention_flops=700e12)
FP8 = torch.float8_e4m3fn


def _scout(algo: str) -> ModelCost:
    raw = {
        "architectures": ["Llama4ForCausalLM"],
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": algo,
            "ignore": ["*router*", "lm_head"],
        },
    }
    return ModelCost.of(parse_hf_config(raw), torch.bfloat16, FP8)


@pytest.fixture(scope="module")
def scout() -> ModelCost:
    """Scout in FP8 with an FP8 cache, from the published dimensions."""
    return _scout("FP8")


def test_scouts_floors(scout: ModelCost) -> None:
    """Guards the count against the round figures of the design: bytes of a token, of all experts, of a prompt."""
    one = scout.decode(1, 1024, H200)
    assert one.num_bytes == pytest.approx(17e9, rel=0.03) and one.seconds == pytest.approx(4.0e-3, rel=0.05)
    everything = scout.dense_bytes + 48 * 16 * scout.expert_bytes + scout.head_bytes
    assert everything / 2**30 == pytest.approx(101, abs=1)
    assert scout.kv_bytes_per_token * 48 == 96 * 1024
    assert scout.prefill(1024, 8192, H200).flops == pytest.approx(33e12, rel=0.1)
    full = scout.decode(150, 1024, H200)
    assert full.dense_s + full.experts_s + full.head_s == pytest.approx(26e-3, rel=0.05)
    assert full.attention_s == pytest.approx(150 * 1024 * 96 * 1024 / 4.28e12, rel=0.01)


def test_nvfp4_takes_fewer_bytes(scout: ModelCost) -> None:
    """Guards packed weights: an expert is half its FP8 bytes and a sixteenth more for the block scales."""
    assert _scout("NVFP4").expert_bytes / scout.expert_bytes == pytest.approx(0.5 + 1 / 16, rel=0.001)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 70), (31, 1), (32, 1), (33, 64), (95, 2)])
def test_attention_is_counted_position_by_position(shared: Path, start: int, count: int) -> None:
    """Guards chunked layers at their borders, against a count of every query-key pair."""
    config = load_model_config(shared / "fixtures" / "llama4-tiny-a" / "fp8")
    cost = ModelCost.of(config, torch.float32, FP8)
    chunk = config.attention_chunk_size
    assert chunk == 32
    pairs, reads = 0, 0
    for is_local in config.rope_layers:
        seen = set()
        for query in range(start, start + count):
            keys = range(query // chunk * chunk if is_local else 0, query + 1)
            pairs += len(keys)
            seen |= set(keys)
        reads += len(seen)
    slow = Rates(1.0, 1.0, 1.0)
    bare = cost.step([Slice(start, count)], slow)
    expected = 4.0 * config.num_heads * config.head_dim * pairs
    assert bare.attention_s == max(expected, (reads + count * config.num_layers) * cost.kv_bytes_per_token)


def test_pretended_prompts_keep_the_ledger() -> None:
    """Guards the cache that is filled without a prefill: its blocks are those a computed prompt would hold."""
    layout = plan_layout((True, True, False, True), 64, 512, 16)
    cache = sweep.FilledCache(KVManager(layout, 200, False))
    cache.pretend = True
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    sequences = []
    for index, length in enumerate((1, 17, 64, 65, 200)):
        request = Request(request_id=str(index), prompt_token_ids=[1] * length, sampling=params)
        seq = Sequence(request, index, len(layout.groups))
        assert cache.match_prefix(seq) == length - 1
        assert cache.try_extend(seq, length) is not None
        cache.commit(seq, length)
        held = sum(block > 0 for table in seq.block_tables for block in table)
        assert held <= cache.num_blocks_for(length)
        assert all(len(table) == -(-length // 16) for table in seq.block_tables)
        sequences.append(seq)
    cache.check_integrity(sequences)
    for seq in sequences:
        cache.release(seq)
    assert cache.pool.num_used == 0


def _run(monkeypatch: pytest.MonkeyPatch, shared: Path, out: Path, *extra: str) -> dict:
    model = shared / "fixtures" / "llama4-tiny-a" / "fp8"
    argv = ["sweep", "--model", str(model), "--out", str(out), "--concurrency", "1,3", "--lengths", "40,100"]
    monkeypatch.setattr(sys, "argv", [*argv, "--steps", "2", "--point-seconds", "1", *extra])
    threads = torch.get_num_threads()
    sweep.main()
    torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_whole_sweep(monkeypatch: pytest.MonkeyPatch, shared: Path, tmp_path: Path) -> None:
    """Guards the run itself: every point measured with all its streams decoding, and drawn."""
    result = _run(monkeypatch, shared, tmp_path / "sweep.json")
    found = {(row["kind"], row["concurrency"], row["length"]) for row in result["points"]}
    decodes = set(itertools.product(["decode"], [1, 3], [40, 100]))
    assert found == decodes | {("prefill", 1, 40), ("prefill", 1, 100)} and not result["skipped"]
    for row in result["points"]:
        assert row["ms"] > row["floor_ms"] > 0 and row["steps"] > 0
        assert row.get("streams", row["concurrency"]) == row["concurrency"] and not row.get("preemptions")
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<svg") == 5 and "decode 3 x 100" in page and "not measured" not in page
    assert result["command"].startswith("python -m benchmarks.sweep --model ")


def test_page_says_what_the_file_says(monkeypatch: pytest.MonkeyPatch, shared: Path, tmp_path: Path) -> None:
    """Guards a page that leaves out the note, a point's own day, or what was not measured and why."""
    monkeypatch.setattr(sweep.Bench, "decode", lambda *_: None)
    result = _run(monkeypatch, shared, tmp_path / "sweep.json", "--lengths", "40")
    assert [row["concurrency"] for row in result["skipped"]] == [3, 1] and len(result["points"]) == 1
    result["note"] = "one point is older"
    result["points"][0]["date"] = "1999-12-31"
    page = sweep.sweep_page(result)
    assert "one point is older" in page and "<td>1999-12-31</td>" in page
    assert f"<td>decode 3 x 40</td><td>{sweep.TOO_LARGE}</td>" in page


def test_time_limit_and_full_cache(monkeypatch: pytest.MonkeyPatch, shared: Path, tmp_path: Path) -> None:
    """Guards a job with a time limit: past it nothing begins and the files still say what was left out."""
    result = _run(monkeypatch, shared, tmp_path / "late.json", "--time-limit", "0")
    assert result["points"] == [] and [row["why"] for row in result["skipped"]] == [sweep.TOO_LATE] * 6
    full = ["--num-gpu-blocks-override", "120", "--lengths", "100", "--concurrency", "1,40"]
    few = _run(monkeypatch, shared, tmp_path / "few.json", *full)
    rows = {row["concurrency"]: row for row in few["points"] if row["kind"] == "decode"}
    assert rows[1]["streams"] == 1 and 1 < rows[40]["streams"] < 40
    assert rows[40]["steps"] > 0, "as many as fit decode together from the start"
