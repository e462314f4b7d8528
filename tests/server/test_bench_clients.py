"""The request shapes of load generators, and what each reads of the answers.

Each entry is what the program sends: ``vllm bench serve`` by its specification, guidellm 0.8 as captured on the wire
(it was run against this server), sglang's benchmark and aiperf by theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Server

MakeServer = Callable[..., Server]
USAGE = {"include_usage": True}
EACH = {"include_usage": True, "continuous_usage_stats": True}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Finish medical want almost"}]}]
INPUT = [{"role": "user", "content": [{"type": "input_text", "text": "Finish medical want almost"}]}]
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench": (
        TEXT,
        {"prompt": "x", "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None, "stream": True}
        | {"stream_options": USAGE, "ignore_eos": True},
    ),
    "vllm bench, sampled": (
        TEXT,
        {"prompt": "x", "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": 1, "stream": True}
        | {"stream_options": USAGE, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.0}
        | {"presence_penalty": 0.0, "frequency_penalty": 0.0, "request_id": "bench-12345678-0"},
    ),
    "vllm bench, chat": (
        CHAT,
        {"messages": PARTS, "max_completion_tokens": 6, "stream": True, "stream_options": USAGE}
        | {"ignore_eos": True, "temperature": 0.0},
    ),
    "guidellm": (
        CHAT,
        {"messages": PARTS, "max_completion_tokens": 6, "stream": True, "stream_options": EACH}
        | {"ignore_eos": True},
    ),
    "guidellm, completions": (
        TEXT,
        {"prompt": "x", "max_tokens": 6, "stream": True, "stream_options": EACH, "ignore_eos": True},
    ),
    "guidellm, whole": (TEXT, {"prompt": "x", "max_tokens": 6, "ignore_eos": True}),
    "guidellm, responses": (
        RESPONSES,
        {"input": INPUT, "max_output_tokens": 6, "stream": True, "ignore_eos": True},
    ),
    "guidellm, responses whole": (RESPONSES, {"input": INPUT, "max_output_tokens": 6, "ignore_eos": True}),
    "sglang bench": (
        TEXT,
        {"prompt": "x", "best_of": 1, "max_tokens": 6, "stream": True, "stream_options": USAGE}
        | {"ignore_eos": True, "temperature": 0.0},
    ),
    "aiperf": (
        CHAT,
        {"messages": [{"role": "user", "name": "u", "content": "x"}], "max_tokens": 6, "min_tokens": 6}
        | {"stream": True, "stream_options": USAGE, "ignore_eos": True, "n": 1, "user": "u"},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_served(make_server: MakeServer, name: str) -> None:
    """Guards a benchmark that counts only failures: status, tokens and usage where each client looks for them."""
    server = make_server([5] * 3 + [999] * 3)  # an end token early on: ignore_eos must hold
    path, body = SHAPES[name]
    headers = {"x-request-id": "bench-12345678-0", "Authorization": "Bearer EMPTY"}
    answer = server.http.post(path, json={"model": "tiny", **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    ignores = body.get("ignore_eos", False)
    num_tokens = 6 if ignores else 4
    assert server.engine.submitted[0].sampling.ignore_eos == ignores
    if not body.get("stream"):
        usage = answer.json()["usage"]
        assert usage.get("completion_tokens", usage.get("output_tokens")) == num_tokens
        return
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if path == RESPONSES:
        assert events[-1]["type"] == "response.completed" or events[-1]["type"] == "response.incomplete"
        assert events[-1]["response"]["usage"]["output_tokens"] == num_tokens
        assert any(event["type"] == "response.output_text.delta" for event in events)
        return
    assert answer.text.endswith("data: [DONE]\n\n")
    *chunks, last = events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == num_tokens
    assert all(chunk["choices"] for chunk in chunks)
    assert len(chunks) == num_tokens + (path == CHAT)
    if body["stream_options"] is EACH:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == num_tokens
    else:
        assert not any("usage" in chunk for chunk in chunks)
    if path == TEXT:
        assert last["id"] == "cmpl-bench-12345678-0"


def test_what_load_generators_ask_first(server: Server) -> None:
    """Guards the ready check, the model's name and root, and the tokenizer routes of ``vllm bench serve``."""
    assert server.http.get("/health").status_code == 200
    card = server.http.get("/v1/models").json()["data"][0]
    assert card["id"] == "tiny" and card["root"] == "tests/tiny"
    body = {"model": "tiny", "prompt": "one two", "add_special_tokens": False}
    ids = server.http.post("/tokenize", json=body).json()["tokens"]
    assert (
        server.http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json()["prompt"] == "one two"
    )
