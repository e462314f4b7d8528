"""``bench serve`` against fake servers with known delays: figures, report, JSON, datasets."""

import json
import re
from datetime import datetime

import numpy as np
import pytest

from outrider.errors import ConfigError
from outrider.tools import bench_serve


def run_json(args, tmp_path, capsys):
    assert bench_serve.run(args) == 0
    return json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out


def until_quiet(measure):
    """Repeat ``measure`` up to five times until it finds nothing amiss; returns what it found last.

    A busy machine lets the client read late once in a while; a wrong definition is wrong every time.
    """
    for _ in range(5):
        if not (amiss := measure()):
            break
    return amiss


def apart(result, expected, slack_ms=0.0):
    """``key: ours, theirs`` for each value that is more than 2 % (and ``slack_ms``) away from ``expected``."""
    pairs = [(key, result[key], value) for key, value in expected.items()]
    return [
        f"{k}: {ours}, {value}" for k, ours, value in pairs if abs(ours - value) > max(0.02 * value, slack_ms)
    ]


def common(server, tmp_path, *more):
    return (
        "--base-url", server.url, "--model", "fake", "--dataset-name", "random", "--ignore-eos",
        "--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json",
        *more, )  # fmt: skip


@pytest.mark.parametrize("backend", ["vllm", "openai-chat"])
@pytest.mark.parametrize("tokens_per_chunk", [1, 3])
def test_figures_agree_with_the_servers_own_count(
    fake, serve_args, tmp_path, capsys, backend, tokens_per_chunk
):
    """Guards: start stamped before the slot, TTFT on the headers, ITL per token, TPOT over n, wrong
    duration.
    """
    server = fake(ttft_s=0.3, itl_s=0.05, tokens_per_chunk=tokens_per_chunk)
    words = (
        "--backend",
        backend,
        "--num-prompts",
        "8",
        "--max-concurrency",
        "4",
        "--random-input-len",
        "16",
    )
    args = serve_args(*common(server, tmp_path, *words, "--random-output-len", "21"))

    def measure():
        server.served.clear()
        result, _ = run_json(args, tmp_path, capsys)
        served = server.served[1:]  # the first is the ready check
        assert len(served) == 8 and result["completed"] == 8
        ttft = np.array([s.sent[0] - s.received for s in served])
        span = np.array([s.sent[-1] - s.sent[0] for s in served])
        gaps = np.concatenate([np.diff(s.sent) for s in served])
        duration = max(s.sent[-1] for s in served) - min(s.received for s in served)
        expected = {
            "mean_ttft_ms": ttft.mean() * 1e3,
            "median_ttft_ms": np.median(ttft) * 1e3,
            "mean_tpot_ms": (span / 20).mean() * 1e3,
            "mean_itl_ms": gaps.mean() * 1e3,
            "duration": duration,
            "request_throughput": 8 / duration,
            "output_throughput": 8 * 21 / duration,
            "total_token_throughput": 8 * (21 + 7) / duration,
            "total_output_tokens": 168,
            "total_input_tokens": 56,
        }
        assert result["mean_ttft_ms"] >= 300 and result["mean_itl_ms"] >= 49
        assert max(result["ttfts"]) < 0.6, "waiting for a slot was counted as TTFT"
        itls = sorted(np.mean(itls) for itls in result["itls"])
        theirs = sorted(np.mean(np.diff(s.sent)) for s in served)
        return apart(result, expected) + apart(dict(enumerate(itls)), dict(enumerate(theirs)))

    assert not until_quiet(measure)


def test_every_statistic_of_uneven_answers(fake, serve_args, tmp_path, capsys):
    """Guards each mean, median, deviation and percentile, where requests and gaps differ as they do in life."""
    server = fake(ttft_s=0.15, itl_s=0.04, uneven=True)
    words = ("--num-prompts", "12", "--max-concurrency", "4", "--random-input-len", "16")
    words += ("--random-output-len", "9", "--percentile-metrics", "ttft,tpot,itl,e2el")
    words += ("--metric-percentiles", "25,50,90,99", "--goodput", "ttft:400", "e2el:900")
    args = serve_args(*common(server, tmp_path, *words))

    def measure():
        server.served.clear()
        result, _ = run_json(args, tmp_path, capsys)
        served = server.served[1:]
        ttft = np.array([s.sent[0] - s.received for s in served])
        e2el = np.array([s.sent[-1] - s.received for s in served])
        values = {"ttft": ttft, "e2el": e2el, "tpot": (e2el - ttft) / 8}
        values["itl"] = np.concatenate([np.diff(s.sent) for s in served])
        expected = {}
        for name, array in values.items():
            ms = 1e3 * array
            statistics = {"mean": ms.mean(), "median": np.median(ms), "std": ms.std()}
            statistics |= {f"p{p}": np.percentile(ms, p) for p in (25, 50, 90, 99)}
            expected |= {f"{statistic}_{name}_ms": value for statistic, value in statistics.items()}
        good = int(((ttft <= 0.4) & (e2el <= 0.9)).sum())
        duration = max(s.sent[-1] for s in served) - min(s.received for s in served)
        figures = {
            "duration": duration,
            "request_goodput": good / duration,
            "output_throughput": 108 / duration,
        }
        assert 0 < good < 12
        assert ttft.max() > 2 * ttft.min() and values["itl"].max() > 2 * values["itl"].min()
        return apart(result, expected, slack_ms=1.0) + apart(result, figures)

    assert not until_quiet(measure)


def test_ramp_is_told(fake, serve_args, tmp_path, capsys):
    """Guards the times at which a ramp reaches each whole rate, and the ramp's own keys."""
    server = fake(ttft_s=0.0, itl_s=0.0)
    words = (
        "--num-prompts",
        "40",
        "--random-input-len",
        "8",
        "--random-output-len",
        "2",
        "--burstiness",
        "inf",
    )
    ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "20", "--ramp-up-end-rps", "60")
    result, _ = run_json(serve_args(*common(server, tmp_path, *words, *ramp)), tmp_path, capsys)
    assert (result["ramp_up_strategy"], result["ramp_up_start_rps"], result["ramp_up_end_rps"]) == (
        "linear", 20.0, 60.0,
    )  # fmt: skip
    assert [change["rps"] for change in result["rps_change_events"]] == list(range(20, 61))
    times = [datetime.fromisoformat(change["timestamp"]) for change in result["rps_change_events"]]
    assert times == sorted(times) and abs((datetime.now() - times[-1]).total_seconds()) < 60
    sent = np.diff([s.received for s in server.served[1:]])
    assert sent.sum() == pytest.approx((times[-1] - times[0]).total_seconds(), abs=0.1)
    assert sent[:10].mean() > 1.5 * sent[-10:].mean()


def test_report_lines_are_the_recipes(fake, serve_args, tmp_path, capsys, shared):
    """Guards: a label, its order, its spacing or the number format differs from what the recipe prints."""
    recipe = (shared / "recipe" / "llama4-scout-on-vllm.md").read_text()
    block = re.search(r"^=+ Serving Benchmark Result =+\n.*?^=+$", recipe, re.S | re.M).group(0)
    server = fake(ttft_s=0.01, itl_s=0.001)
    words = (
        "--num-prompts",
        "3",
        "--max-concurrency",
        "2",
        "--random-input-len",
        "8",
        "--random-output-len",
        "4",
    )
    _, printed = run_json(serve_args(*common(server, tmp_path, *words)), tmp_path, capsys)
    report = re.search(r"^=+ Serving Benchmark Result =+\n.*?^=+$", printed, re.S | re.M).group(0)

    def shape(text):
        return [re.sub(r"\d+$", "N", re.sub(r"\d+\.\d\d$", "F", line)) for line in text.splitlines()]

    assert shape(report) == shape(block)


def test_v1_report_and_metrics_on_demand(fake, serve_args, tmp_path, capsys):
    """Guards: rows of the newer form missing, or E2EL and further percentiles not printed when asked for."""
    server = fake(ttft_s=0.01, itl_s=0.001)
    words = (
        "--num-prompts",
        "4",
        "--request-rate",
        "200",
        "--random-output-len",
        "4",
        "--report-style",
        "v1",
    )
    more = ("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "50,99.9", "--goodput", "ttft:1000")
    args = serve_args(*common(server, tmp_path, *words, *more, "--random-input-len", "8"))
    result, printed = run_json(args, tmp_path, capsys)
    report = printed[printed.index("=====") :].splitlines()
    labels = [line.split(":")[0] for line in report if re.match(r"[^:]{3,40}:\s+[\d.]+$", line)]
    assert labels == [
        "Successful requests", "Failed requests", "Request rate configured (RPS)", "Benchmark duration (s)",
        "Total input tokens", "Total generated tokens", "Request throughput (req/s)",
        "Request goodput (req/s)", "Output token throughput (tok/s)", "Peak output token throughput (tok/s)",
        "Peak concurrent requests", "Total token throughput (tok/s)", "Mean TTFT (ms)", "Median TTFT (ms)",
        "P50 TTFT (ms)", "P99.9 TTFT (ms)", "Mean E2EL (ms)", "Median E2EL (ms)", "P50 E2EL (ms)",
        "P99.9 E2EL (ms)",
    ]  # fmt: skip
    assert result["request_rate"] == 200.0 and result["p99.9_e2el_ms"] >= result["p50_e2el_ms"]
    assert result["request_goodput"] == pytest.approx(4 / result["duration"])


def test_json_keys(fake, serve_args, tmp_path, capsys):
    """Guards: a key that dashboards read is renamed, missing or out of order; 'inf' not written as text."""
    server = fake(ttft_s=0.005, itl_s=0.001)
    words = (
        "--num-prompts",
        "2",
        "--random-input-len",
        "8",
        "--random-output-len",
        "3",
        "--metadata",
        "gpu=none",
    )
    result, _ = run_json(serve_args(*common(server, tmp_path, *words)), tmp_path, capsys)
    spec = """
        date endpoint_type backend label model_id tokenizer_id num_prompts gpu request_rate burstiness
        max_concurrency duration completed failed total_input_tokens total_output_tokens request_throughput
        request_goodput output_throughput total_token_throughput max_output_tokens_per_s
        max_concurrent_requests rtfx
    """.split()  # noqa: SIM905
    assert list(result)[: len(spec)] == spec
    stats = [f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl") for s in ("mean", "median", "std", "p99")]
    lists = ["input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors"]
    assert list(result)[len(spec) :] == ["request_goodput:", *stats, *lists]
    assert result["request_rate"] == "inf" and result["generated_texts"] == [" w0 w1 w2"] * 2
    assert "\n" not in (tmp_path / "r.json").read_text()


def test_failures_are_counted_not_averaged(fake, serve_args, tmp_path, capsys):
    """Guards: refused or cut-off answers counted as successes, or a dead connection reused."""
    server = fake(ttft_s=0.005, itl_s=0.001, fail_every=4, cut_every=5)
    words = (
        "--num-prompts",
        "19",
        "--max-concurrency",
        "1",
        "--random-input-len",
        "8",
        "--random-output-len",
        "4",
    )
    more = ("--ready-check-timeout-sec", "0", "--base-url", f"{server.url}/v1/")
    result, _ = run_json(serve_args(*common(server, tmp_path, *words, *more)), tmp_path, capsys)
    refused, cut = 19 // 4, 19 // 5
    assert result["failed"] == refused + cut and result["completed"] == 19 - refused - cut
    assert sum("HTTP 503" in error and "queue is full" in error for error in result["errors"]) == refused
    assert result["total_output_tokens"] == 4 * result["completed"]


def test_idle_connections_closed_by_the_server_are_replaced(fake, serve_args, tmp_path, capsys):
    """Guards: a keep-alive connection that the server closed meanwhile turns into a failed request."""
    server = fake(ttft_s=0.002, itl_s=0.0, close_idle=True)
    words = (
        "--num-prompts",
        "30",
        "--max-concurrency",
        "3",
        "--random-input-len",
        "8",
        "--random-output-len",
        "2",
    )
    result, _ = run_json(serve_args(*common(server, tmp_path, *words)), tmp_path, capsys)
    assert result["failed"] == 0 and result["completed"] == 30


def test_request_bodies(fake, serve_args, tmp_path, capsys, monkeypatch):
    """Guards: a sampling flag, header or usage request that never reaches the wire, or one sent unasked."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server = fake(ttft_s=0.0, itl_s=0.0)
    words = ("--num-prompts", "1", "--random-input-len", "8", "--random-output-len", "2", "--top-p", "0.5")
    more = ("--extra-body", '{"min_tokens": 2}', "--header", "X-A=b", "--request-id-prefix", "q-")
    run_json(serve_args(*common(server, tmp_path, *words, *more)), tmp_path, capsys)
    body, headers = server.served[-1].body, server.served[-1].headers
    prompt = body.pop("prompt")
    assert len(prompt.encode()) == 7, "8 tokens less the server's one special token"
    assert body == {
        "model": "fake", "max_tokens": 2, "repetition_penalty": 1.0, "stream": True, "temperature": 0.0,
        "stream_options": {"include_usage": True}, "top_p": 0.5, "ignore_eos": True, "min_tokens": 2,
    }  # fmt: skip
    assert (
        headers["authorization"] == "Bearer k" and headers["x-a"] == "b" and headers["x-request-id"] == "q-0"
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--endpoint", "/v1/chat/completions"), "--endpoint"),
        (("--request-rate", "0"), "--request-rate"),
        (("--goodput", "itl:5"), "--goodput"),
        (("--metric-percentiles", "101"), "--metric-percentiles"),
        (("--ramp-up-strategy", "linear"), "--ramp-up-start-rps"),
        (("--dataset-name", "sharegpt"), "--dataset-path"),
        (("--random-range-ratio", "1.0"), "--random-range-ratio"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--seed", "-1"), "--seed"),
        (("--random-prefix-len", "-5"), "--random-prefix-len"),
        (("--base-url", "somewhere"), "--base-url"),
        (("--port", "99999"), "--port"),
        (("--html", "/proc/none/page.html"), "--html"),
        (("--result-dir", "/proc/none"), "--result-filename"),
        (("--html", "x.html", "--html-compare", "none.json"), "--html-compare"),
        (("--metadata", "x"), "--metadata"),
    ],
)
def test_bad_flags_are_refused_by_name(fake, serve_args, tmp_path, words, part):
    """Guards: a traceback, a measurement of something else than asked, or minutes of it thrown away at the end."""
    server = fake()
    with pytest.raises(ConfigError, match=re.escape(part)):
        bench_serve.run(serve_args(*common(server, tmp_path, *words)))
    assert not server.served


def test_no_server_is_one_sentence(serve_args):
    """Guards: a stack of tracebacks when the port is wrong."""
    with pytest.raises(ConfigError, match="No server answers"):
        bench_serve.run(serve_args("--port", "1", "--ready-check-timeout-sec", "0.1"))
