"""``/metrics``: the names that dashboards plot, and values that agree with an independent count."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider.types import STEP_TOKEN_BUCKETS, EngineStats, Request, TokenEvent
from tests.server.conftest import Server
from tests.server.fake_engine import FakeEngine

MakeServer = Callable[..., Server]
GAUGES = """num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc
gpu_cache_usage_perc engine_sleep_state cache_config_info"""
COUNTERS = """prompt_tokens generation_tokens prompt_tokens_cached prompt_tokens_by_source request_success
num_preemptions prefix_cache_queries prefix_cache_hits gpu_prefix_cache_queries gpu_prefix_cache_hits
external_prefix_cache_queries external_prefix_cache_hits mm_cache_queries mm_cache_hits spec_decode_num_drafts
spec_decode_num_draft_tokens spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos
tool_call_parser_invocations"""
HISTOGRAMS = """time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds
request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens request_generation_tokens
request_max_num_generation_tokens request_params_max_tokens request_prefill_kv_computed_tokens request_params_n
iteration_tokens_total"""
HTTP = {
    "http_requests": "counter",
    "http_request_duration_seconds": "histogram",
    "http_request_duration_highr_seconds": "histogram",
    "http_request_size_bytes": "summary",
    "http_response_size_bytes": "summary",
}


class Queue(FakeEngine):
    """Says that each request waited ``QUEUE_S``, half of its first token's delay, and that 2 prompt ids were cached."""

    QUEUE_S = 0.02

    async def _events(self, request: Request) -> AsyncIterator[TokenEvent]:
        first = True
        async for event in super()._events(request):
            if first:
                event.queue_s, event.num_cached_tokens, first = self.QUEUE_S, 2, False
            yield event


def samples(server: Server) -> dict[str, float]:
    """Values by name and by the labels beside ``model_name`` and ``engine``."""
    found = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + (json.dumps(labels, sort_keys=True) if labels else "")] = sample.value
    return found


def test_every_name_that_dashboards_plot(server: Server) -> None:
    """Guards each family's name, type and labels; a Grafana board of this API finds no empty panel."""
    families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
    wanted = {f"vllm:{name}": "gauge" for name in GAUGES.split()}
    wanted |= {f"vllm:{name}": "counter" for name in COUNTERS.split()}
    wanted |= {f"vllm:{name}": "histogram" for name in HISTOGRAMS.split()}
    wanted |= HTTP | {"python_gc_objects_collected": "counter", "process_resident_memory_bytes": "gauge"}
    assert {name: families[name].type if name in families else "missing" for name in wanted} == wanted
    for name, family in families.items():
        for sample in family.samples if name.startswith("vllm:") else ():
            assert sample.labels["engine"] == "0", sample
            assert name == "vllm:cache_config_info" or sample.labels["model_name"] == "tiny"
    text = server.http.get("/metrics").text
    assert "vllm:generation_tokens_created{" in text and "vllm:request_success_created{" in text
    assert server.http.get("/metrics/").status_code == 200  # no redirect
    (config,) = families["vllm:cache_config_info"].samples
    assert config.labels["block_size"] == "16" and config.labels["gpu_memory_utilization"] == "0.9"
    assert config.labels["enable_prefix_caching"] == "True"


def test_operations_page_names_what_there_is(server: Server) -> None:
    """Guards the page's table of times against a renamed metric."""
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)`", page.split("\n## Metrics\n")[1].split("\n## ")[0])
    known = {*GAUGES.split(), *HISTOGRAMS.split(), "model_name", "engine", "capacity", "deferred"}
    assert len(named) > 8 and set(named) <= known


def test_times_of_a_request_add_up(server: Server) -> None:
    """Guards the split of a request's time: queue + prefill = first token, prefill + decode = inference."""
    engine = server.engine
    engine.__class__ = Queue
    engine.delay_s = 2 * Queue.QUEUE_S
    for _ in range(2):
        server.post("/v1/completions", prompt=[1, 2, 3, 4, 5], max_tokens=4)
    values = samples(server)
    total = {name: values[f"vllm:{name}_sum"] for name in HISTOGRAMS.split()}
    assert total["request_queue_time_seconds"] == pytest.approx(2 * Queue.QUEUE_S)
    assert total["request_prefill_time_seconds"] >= 2 * Queue.QUEUE_S * 0.9
    first = total["request_queue_time_seconds"] + total["request_prefill_time_seconds"]
    assert first == pytest.approx(total["time_to_first_token_seconds"], rel=1e-3)
    inference = total["request_prefill_time_seconds"] + total["request_decode_time_seconds"]
    assert inference == pytest.approx(total["request_inference_time_seconds"], rel=1e-3)
    assert total["request_decode_time_seconds"] >= 2 * 3 * engine.delay_s * 0.9
    assert total["request_decode_time_seconds"] == pytest.approx(
        total["inter_token_latency_seconds"], rel=1e-3
    )
    whole = total["request_queue_time_seconds"] + total["request_inference_time_seconds"]
    assert whole <= total["e2e_request_latency_seconds"] * 1.001
    assert total["request_prefill_kv_computed_tokens"] == 6 and total["request_prompt_tokens"] == 10
    assert {values[f"vllm:{n}_count"] for n in HISTOGRAMS.split() if n.startswith("request_")} == {2}


def test_parameters_and_sizes(server: Server) -> None:
    """Guards ``n``, the longest of ``n`` choices, tool parses, and body sizes counted to the byte."""
    before = samples(server)
    bodies = [
        {"prompt": [1, 2], "max_tokens": 3, "n": 2, "temperature": 1},
        {"prompt": ["x", "y"], "max_tokens": 4, "n": 3, "temperature": 1},
        {"prompt": "x", "max_tokens": 2, "stream": True},
    ]
    sent = received = 0
    for body in bodies:
        content = json.dumps(body).encode()
        reply = server.http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        sent, received = sent + len(content), received + len(reply.content)
        assert reply.status_code == 200
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]
    messages = [{"role": "user", "content": "x"}]
    assert server.post("/v1/chat/completions", messages=messages, tools=tools, n=2).status_code == 200
    values = samples(server)
    assert values["vllm:request_params_n_sum"] == 2 + 3 + 3 + 1 + 2
    assert values["vllm:request_params_n_count"] == 5
    assert values["vllm:request_params_max_tokens_count"] == 2 + 6 + 1 + 2
    by_call = values["vllm:request_max_num_generation_tokens_sum"]
    assert by_call == 3 + 4 + 4 + 2 + len(server.engine.reply(server.engine.submitted[-1]))
    assert values["vllm:tool_call_parser_invocations_total"] == 2
    handler = '{"handler": "/v1/completions"}'
    assert values[f"http_request_size_bytes_sum{handler}"] == sent
    assert values[f"http_response_size_bytes_sum{handler}"] == received
    assert values[f"http_response_size_bytes_count{handler}"] == 3
    assert values["http_request_duration_highr_seconds_count"] == 4
    assert before["http_request_duration_highr_seconds_count"] == 0, "scrapes are not requests"


def test_engine_snapshot(server: Server) -> None:
    """Guards gauges and counters that are arithmetic on the engine's books."""
    counts = [0] * (len(STEP_TOKEN_BUCKETS) + 1)
    counts[0], counts[2], counts[-1] = 5, 2, 1
    server.engine.stats = EngineStats(
        num_waiting=4,
        num_compiling=3,
        prompt_tokens=100,
        cached_prompt_tokens=60,
        step_tokens_sum=5 + 2 * 12 + 20000,
        step_token_counts=counts,
    )
    values = samples(server)
    assert values["vllm:num_requests_waiting"] == 7
    assert values['vllm:num_requests_waiting_by_reason{"reason": "capacity"}'] == 4
    assert values['vllm:num_requests_waiting_by_reason{"reason": "deferred"}'] == 3
    assert values["vllm:prompt_tokens_total"] == 160
    source = 'vllm:prompt_tokens_by_source_total{"source": "%s"}'
    assert values[source % "local_compute"] == 100 and values[source % "local_cache_hit"] == 60
    bucket = 'vllm:iteration_tokens_total_bucket{"le": "%s"}'
    assert [values[bucket % le] for le in ("1.0", "8.0", "16.0", "16384.0", "+Inf")] == [5, 5, 7, 7, 8]
    assert values["vllm:iteration_tokens_total_sum"] == 20029
    assert values["vllm:iteration_tokens_total_count"] == 8
    assert values['vllm:engine_sleep_state{"sleep_state": "awake"}'] == 1
