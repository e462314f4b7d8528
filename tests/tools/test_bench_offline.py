"""The offline benches on the tiny Llama 4: what they print and write, counted independently."""

import argparse
import json
import re

import numpy as np
import pytest

from outrider.errors import ConfigError
from outrider.tools import bench_latency, bench_throughput


def parse(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture
def tiny(shared):
    return (
        "--model",
        shared / "fixtures" / "llama4-tiny-a" / "bf16",
        "--device",
        "cpu",
        "--max-model-len",
        "128",
    )


@pytest.mark.slow
def test_throughput_adds_up(tiny, tmp_path, capsys):
    """Guards: n not multiplying, an early eos shortening the run, rates over another duration than printed."""
    files = ("--output-json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    sizes = ("--num-prompts", 5, "--input-len", 20, "--output-len", 6, "--n", 2)
    assert bench_throughput.run(parse(bench_throughput, *tiny, *files, *sizes)) == 0
    printed = capsys.readouterr().out
    assert "Total num output tokens:  60" in printed
    prompt_tokens = int(re.search(r"Total num prompt tokens:  (\d+)", printed).group(1))
    assert prompt_tokens == pytest.approx(190, abs=10)  # 2 x 5 x 19: BOS is the server's to add
    requests, total, output = map(
        float, re.findall(r"([\d.]+) (?:requests|total tokens|output tokens)/s", printed)
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert requests == pytest.approx(5 / result["elapsed_time"], abs=0.006)
    assert output == pytest.approx(60 / result["elapsed_time"], abs=0.006)
    assert total == pytest.approx((60 + prompt_tokens) / result["elapsed_time"], abs=0.006)
    assert result["total_num_tokens"] == 60 + prompt_tokens
    assert "<svg" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_latency_statistics(tiny, tmp_path, capsys):
    """Guards: warm-up counted in, percentiles of something else, fewer iterations than asked."""
    files = ("--output-json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    sizes = (
        "--batch-size",
        2,
        "--input-len",
        5,
        "--output-len",
        4,
        "--num-iters-warmup",
        1,
        "--num-iters",
        4,
    )
    assert bench_latency.run(parse(bench_latency, *tiny, *files, *sizes)) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    ordered = sorted(result["latencies"])
    assert result["percentiles"]["50"] == pytest.approx((ordered[1] + ordered[2]) / 2)
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    printed = capsys.readouterr().out
    assert f"Avg latency: {np.mean(result['latencies'])} seconds" in printed
    assert "99% percentile latency:" in printed and "<svg" in (tmp_path / "r.html").read_text()


def test_sizes_are_checked_before_the_engine_starts(tiny):
    """Guards: minutes of loading before a refusal."""
    with pytest.raises(ConfigError, match="--batch-size is 0"):
        bench_latency.run(parse(bench_latency, *tiny, "--batch-size", "0"))
    with pytest.raises(ConfigError, match="--n is 0"):
        bench_throughput.run(parse(bench_throughput, *tiny, "--n", "0"))
