"""The small endpoints over a real socket: models, tokenisation, metrics, facts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from outrider import __version__
from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import Server

MakeServer = Callable[..., Server]


def metrics(server: Server) -> dict[str, float]:
    """Samples of the model's metrics by name."""
    text = server.http.get("/metrics").text
    return {
        sample.name
        + str(
            {k: v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine")}
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name.startswith(("vllm:", "http_"))
    }


def test_models(make_server: MakeServer) -> None:
    """Guards the card that `bench serve` and clients read, one per served name."""
    server = make_server(server={"served_model_name": ["first", "second"]})
    page = server.http.get("/v1/models").json()
    assert [card["id"] for card in page["data"]] == ["first", "second"]
    card = page["data"][0]
    assert list(card) == [
        "id",
        "object",
        "created",
        "owned_by",
        "root",
        "parent",
        "max_model_len",
        "permission",
    ]
    assert card["max_model_len"] == 512 and card["root"] == "tests/tiny"
    answer = server.post("/v1/completions", model="second", prompt="x").json()
    assert answer["model"] == "first"
    unnamed = make_server(server={"served_model_name": []})
    assert unnamed.post("/v1/completions", model="tests/tiny", prompt="x").status_code == 200


def test_tokenize_and_back(server: Server, tokenizer: Tokenizer) -> None:
    """Guards /tokenize and /detokenize as lm_eval's remote tokenizer uses them."""
    text = "Grüße <|eot|> 漢"
    answer = server.post("/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert server.post("/tokenize", prompt=text).json()["tokens"][0] == 992
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    assert (
        server.post("/detokenize", tokens=chat["tokens"])
        .json()["prompt"]
        .startswith("<|begin_of_text|><|header")
    )
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        assert server.post("/tokenize", **body).status_code == 400
    for tokens in ([-1], [2**40], [1024], ["a"], 5):
        assert server.post("/detokenize", tokens=tokens).status_code == 400
    assert server.http.get("/tokenizer_info").json()["eos_token"] == "<|eot|>"


def test_front_end_never_imports_torch() -> None:
    """Guards start-up time and memory of the front end: torch belongs to the engine's process."""
    code = (
        "import sys, outrider.server.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_facts(make_server: MakeServer) -> None:
    """Guards /version, /load and /server_info."""
    server = make_server(server={"enable_server_load_tracking": True})
    assert server.http.get("/version").json() == {"version": __version__}
    assert server.http.get("/load").json() == {"server_load": 0}
    facts = server.http.get("/server_info").json()
    assert facts["engine"]["kv_capacity_tokens"] == 1600 and facts["stats"]["num_running"] == 3
    assert "/v1/completions" in server.http.get("/openapi.json").json()["paths"]


def test_metrics_count_what_happened(server: Server) -> None:
    """Guards dashboards: engine gauges, and per-request histograms that agree with the requests sent."""
    for _ in range(3):
        server.post("/v1/completions", prompt=[1, 2, 3], max_tokens=5)
    server.post("/v1/completions", prompt=[1, 2, 3], max_tokens=100, stop="world")
    server.post("/v1/completions", prompt="x", n=0)
    values = metrics(server)
    assert values["vllm:num_requests_running{}"] == 3
    assert values["vllm:kv_cache_usage_perc{}"] == values["vllm:gpu_cache_usage_perc{}"] == 0.25
    assert values["vllm:generation_tokens_total{}"] == 77
    assert values["vllm:request_success_total{'finished_reason': 'length'}"] == 3
    assert values["vllm:request_success_total{'finished_reason': 'stop'}"] == 1
    assert values["vllm:request_prompt_tokens_sum{}"] == 12
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert values[f"vllm:{name}_count{{}}"] == 4
    assert values["vllm:inter_token_latency_seconds_count{}"] >= 12
    gaps = [
        value for key, value in values.items() if key.startswith("vllm:inter_token_latency_seconds_bucket")
    ]
    assert gaps == sorted(gaps) and gaps[-1] == values["vllm:inter_token_latency_seconds_count{}"]
    handled = "{'handler': '/v1/completions', 'method': 'POST', 'status': '%s'}"
    assert values["http_requests_total" + handled % "2xx"] == 4
    assert values["http_requests_total" + handled % "4xx"] == 1
