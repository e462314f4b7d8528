"""The benchmark's prompts: lengths, reproducibility, filters; oracle: the ``tokenizers`` library itself."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from outrider.errors import ConfigError
from outrider.tools.bench_datasets import DatasetOptions, load_dataset
from outrider.tools.bench_load import Schedule
from outrider.tools.bench_tokenizer import LocalCodec, ServerCodec, open_codec


@pytest.fixture
def folder(shared):
    return shared / "fixtures" / "llama4-tiny-a" / "bf16"


def test_random_prompts_reach_the_asked_length_with_the_servers_bos(folder):
    """Guards: BOS counted twice or not at all, text that encodes to another length, a drift by the index."""
    codec = open_codec([str(folder)])
    options = DatasetOptions(num_prompts=40, input_len=101, output_len=17, seed=3)
    prompts = load_dataset(options, codec)
    oracle = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = [len(oracle.encode(prompt.text).ids) for prompt in prompts]
    assert np.mean([length == 101 for length in lengths]) > 0.7, (
        "this vocabulary of 992 merges seldom settles"
    )
    assert max(abs(length - 101) for length in lengths) <= 4, lengths
    assert {prompt.output_len for prompt in prompts} == {17}
    assert [prompt.num_tokens + 1 for prompt in prompts] == lengths
    assert len({prompt.text for prompt in prompts}) > 30


def test_random_prompts_follow_the_published_draws(folder):
    """Guards: another order of draws or another offset rule; the ids are rebuilt here from the
    description.
    """
    codec = LocalCodec(folder / "tokenizer.json")
    options = DatasetOptions(num_prompts=5, input_len=65, output_len=32, range_ratio=(0.25, 0.5), seed=11)
    prompts = load_dataset(options, codec)
    rng = np.random.default_rng(11)
    input_lens = rng.integers(48, 81, size=5)  # 64 (less BOS) -/+ 25 %, ends included
    output_lens = rng.integers(16, 49, size=5)
    offsets = rng.integers(0, codec.vocab_size, size=5)
    assert [prompt.output_len for prompt in prompts] == output_lens.tolist()
    allowed = codec.allowed_ids
    first = [allowed[(offsets[0] + i) % len(allowed)] for i in range(input_lens[0])]
    assert prompts[0].text[:5] == codec.decode(first)[:5]


def test_same_seed_same_prompts_and_prefix_is_shared(folder):
    """Guards: a hidden source of randomness; a prefix drawn anew for each prompt."""
    codec = LocalCodec(folder / "tokenizer.json")
    options = DatasetOptions(num_prompts=6, input_len=33, prefix_len=20, seed=5)
    first, second = load_dataset(options, codec), load_dataset(options, codec)
    assert first == second
    assert all(prompt.text[:30] == first[0].text[:30] for prompt in first)
    assert load_dataset(DatasetOptions(num_prompts=6, input_len=33, seed=6), codec) != first


def test_the_servers_tokenizer_serves_when_none_is_local(fake, monkeypatch):
    """Guards: a machine without hub or checkpoint that cannot make random prompts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server = fake()
    codec = open_codec(["nobody/nothing"], ServerCodec(server.url, {}, "fake"))
    prompts = load_dataset(DatasetOptions(num_prompts=8, input_len=50, seed=1), codec)
    assert {len(prompt.text.encode()) for prompt in prompts} == {49}
    with pytest.raises(ConfigError, match="--tokenizer FOLDER"):
        open_codec(["nobody"])


def test_sharegpt_keeps_what_fits(folder, tmp_path):
    """Guards: single-turn or overlong talks kept, output length from the wrong turn, too few after
    filtering.
    """
    talk = {
        "good": ["Tell me a story about four goats", "Once upon a time there were four"],
        "short": ["a", "b"],
    }
    talk |= {
        "single": ["only one turn here, nobody answers it"],
        "long": ["goat " * 3000, "no no no no no no"],
    }
    data = [{"conversations": [{"value": text} for text in turns]} for turns in talk.values()]
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(data))
    codec = LocalCodec(folder / "tokenizer.json")
    prompts = load_dataset(DatasetOptions(name="sharegpt", path=str(file), num_prompts=3), codec)
    assert [prompt.text for prompt in prompts] == [talk["good"][0]] * 3
    assert prompts[0].output_len == len(codec.encode(talk["good"][1]))
    few = load_dataset(
        DatasetOptions(name="sharegpt", path=str(file), num_prompts=3, oversample=False), codec
    )
    assert len(few) == 1


def test_custom_lines(tmp_path):
    """Guards: per-line lengths ignored, order lost with --disable-shuffle, a bad line swallowed."""
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"p{i}", "output_tokens": i + 2} for i in range(4)]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    options = DatasetOptions(name="custom", path=str(file), num_prompts=4, output_len=-1, shuffle=False)
    assert [(p.text, p.output_len) for p in load_dataset(options, None)] == [
        (f"p{i}", i + 2) for i in range(4)
    ]
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        load_dataset(options, None)


def test_send_times():
    """Guards: a rate off by the luck of the draw, bursts that ignore burstiness, a ramp that never
    arrives.
    """
    assert Schedule().send_times(5).tolist() == [0.0] * 5
    poisson = Schedule(request_rate=50.0, seed=2).send_times(400)
    assert poisson[-1] == pytest.approx(8.0) and (np.diff(poisson) >= 0).all()
    assert np.std(np.diff(poisson)) == pytest.approx(1 / 50, rel=0.2)
    constant = Schedule(request_rate=50.0, burstiness=float("inf")).send_times(10)
    assert np.diff(constant) == pytest.approx([0.02] * 9)
    ramp = Schedule(ramp=("linear", 10.0, 100.0), burstiness=float("inf")).send_times(101)
    assert 1 / np.diff(ramp)[[0, 49, 99]] == pytest.approx([10.9, 55.0, 100.0])
    exponential = Schedule(ramp=("exponential", 1.0, 100.0), burstiness=float("inf")).send_times(3)
    assert np.diff(exponential) == pytest.approx([0.1, 0.01])
