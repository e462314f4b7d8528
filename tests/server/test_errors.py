"""What goes wrong: numbers, bodies, a failing engine, clients that leave, keys. Over a real socket."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from outrider.engine.protocol import Health
from outrider.errors import EngineDeadError, OverloadedError
from tests.server.conftest import Server
from tests.server.test_completions import events

MakeServer = Callable[..., Server]

RANGES: dict[str, tuple[float | None, float | None, bool]] = {
    "n": (1, 128, True),
    "temperature": (0, 2, False),
    "top_p": (None, 1, False),
    "top_k": (-1, None, True),
    "min_p": (0, 1, False),
    "repetition_penalty": (None, 100, False),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "seed": (-(2**63), 2**63 - 1, True),
    "min_tokens": (0, None, True),
    "max_tokens": (0, 512, True),
    "logprobs": (0, 20, True),
    "prompt_logprobs": (0, 20, True),
    "truncate_prompt_tokens": (-1, None, True),
    "priority": (-(2**31), 2**31 - 1, True),
}


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object, whose shape is the same everywhere."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] == status and error["message"].endswith((".", ")"))
    for leak in ("0x", "Traceback", "/work", "site-packages", "Error(", "msgspec"):
        assert leak not in error["message"]
    return dict(error)


@pytest.mark.parametrize("name", RANGES)
def test_numbers_outside_their_range(server: Server, name: str) -> None:
    """Guards every numeric limit of the API: just outside, absurd, and of another type."""
    low, high, integer = RANGES[name]
    values: list[Any] = ["1", "x", [1], {"a": 1}, True, 10**30, -(10**30), 10**400]
    values += [low - 1 if integer else low - 1e-6] if low is not None else [0.0 if not integer else -(2**63)]
    values += [high + 1 if integer else high + 1e-6] if high is not None else []
    values += [1.5] if integer else []
    for value in values:
        error = refused(server.post("/v1/completions", prompt="x", echo=True, **{name: value}))
        assert name in error["message"] or error["param"] == "input_tokens"
    assert not server.engine.submitted


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "00", "0x10", "+1"]
)
def test_numbers_that_json_lacks(server: Server, number: str) -> None:
    """Guards against NaN and infinities, which Python's own json module would let in."""
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        body = f'{{"prompt": "x", "{name}": {number}}}'
        headers = {"content-type": "application/json"}
        refused(server.http.post("/v1/completions", content=body, headers=headers))
    refused(
        server.http.post("/v1/completions", content=f'{{"prompt": "x", "logit_bias": {{"1": {number}}}}}')
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00x"}',
        b'{"prompt": "\\ud800x"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x", "response_format": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"prompt": [1, "a"]}',
        b'{"prompt": [-1]}',
        b'{"prompt": [[]]}',
        b'{"prompt": []}',
        b'{"prompt": [1.5]}',
        b'{"prompt": null}',
        b'{"prompt": [1010]}',
        b'{"prompt": "x", "stop": ""}',
        b'{"prompt": "x", "stop": ["a", ""]}',
        b'{"prompt": "x", "logit_bias": {"5000": 1}}',
        b'{"prompt": "x", "logit_bias": {"-1": 1}}',
        b'{"prompt": "x", "allowed_token_ids": []}',
        b'{"prompt": "x", "stop_token_ids": [4096]}',
        b'{"prompt": "x", "suffix": "y"}',
        b'{"prompt": "x", "use_beam_search": true}',
        b'{"prompt": "x", "n": 2, "temperature": 0}',
        b'{"prompt": "x", "cache_salt": ""}',
        b'{"prompt": "x", "request_id": "a\\nb"}',
        b'{"prompt": "x", "min_tokens": 17}',
        b'{"prompt": "x", "stream": true, "prompt_logprobs": 1}',
        b'{"prompt": "x", "response_format": {"type": "xml"}}',
        b'{"prompt": "x", "structured_outputs": {}}',
        b'{"prompt": "x", "guided_regex": "a", "guided_choice": ["b"]}',
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
def test_bodies_that_are_refused(server: Server, body: bytes) -> None:
    """Guards that every malformed or unsupported body is a 400 and never a 500."""
    headers = {"content-type": "application/json"}
    refused(server.http.post("/v1/completions", content=body, headers=headers))
    assert not server.engine.submitted


def test_fuzzed_bodies_never_break_the_server(server: Server) -> None:
    """Guards against any 5xx: random fields with random values, and the server still answers after them."""
    rng = random.Random()
    names = [
        *RANGES,
        "prompt",
        "stop",
        "stream",
        "logit_bias",
        "echo",
        "stop_token_ids",
        "response_format",
        "model",
    ]
    pool: list[Any] = [None, True, False, 0, 1, -1, 2, 0.5, "", "x", "<|eot|>", [], [1], ["a"], {}, {"a": 1}]
    pool += [2**31, 2**63, -(2**63), 1e308, [[1]], [[]], {"type": "json_object"}, "tiny"]
    for _ in range(2000):
        body = {"prompt": "x"} | {rng.choice(names): rng.choice(pool) for _ in range(rng.randrange(1, 5))}
        response = server.post("/v1/completions", **body)
        assert response.status_code in (200, 400, 404), (body, response.text)
    assert server.post("/v1/completions", prompt="x").status_code == 200


def random_json(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, with words that chats use among its keys and texts."""
    words = [
        "role",
        "content",
        "type",
        "text",
        "user",
        "tool",
        "function",
        "name",
        "arguments",
        "self",
        "<|eot|>",
        "",
    ]
    words += [
        "tool_calls",
        "assistant",
        "image_url",
        "url",
        "data:image/png;base64,AA",
        "{",
        "{{ 1 }}",
        "messages",
    ]
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(words): random_json(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [None, True, rng.randrange(-5, 5), rng.random(), rng.choice(words), rng.choice(words)][kind]


def test_fuzzed_chats_never_break_the_server(make_server: MakeServer) -> None:
    """Guards against any 5xx from odd messages, tools, documents and template arguments, for two templates."""
    rng = random.Random()
    template = "{% for m in messages %}{{ m.role + m.content }}{{ m.tool_calls[0].function.arguments.x }}{% endfor %}"
    for config in ({}, {"chat_template": template + "{{ tools | tojson }}{{ documents }}{{ note }}"}):
        server = make_server(server=config)
        for _ in range(800):
            message = {"role": rng.choice(["user", "assistant", "tool"]), "content": random_json(rng)}
            message |= {
                key: random_json(rng) for key in rng.sample(["tool_calls", "name", "tool_call_id"], 2)
            }
            body: dict[str, Any] = {
                "messages": rng.choice([[message], [message, random_json(rng)], random_json(rng)])
            }
            for key in rng.sample(
                ["tools", "documents", "chat_template_kwargs", "stop", "logit_bias", "echo"], 2
            ):
                body[key] = random_json(rng)
            response = server.post("/v1/chat/completions", **body)
            assert response.status_code in (200, 400, 422), (body, response.text)


def test_context_length_message(server: Server) -> None:
    """Guards the sentence that clients match on, and that the limit itself is allowed."""
    assert server.post("/v1/completions", prompt=[1] * 500, max_tokens=12).status_code == 200
    error = refused(server.post("/v1/completions", prompt=[1] * 501, max_tokens=12))
    assert error["message"].startswith(
        "This model's maximum context length is 512 tokens. However, you requested 12"
    )
    assert error["param"] == "input_tokens"
    refused(server.post("/v1/completions", prompt=[1] * 500))
    assert refused(server.post("/v1/completions", prompt="x" * 200_000))["param"] == "input_text"
    assert refused(server.post("/v1/completions", prompt="x", max_tokens=513))["param"] == "max_tokens"


def test_media_type_and_size(server: Server) -> None:
    """Guards the content type and the bound on bodies, announced or not."""
    refused(server.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}))
    refused(server.http.post("/v1/completions", content=b" " * (33 << 20)), 413)

    def chunks() -> Any:
        for _ in range(34):
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    refused(server.http.post("/v1/completions", content=chunks(), headers=headers), 413)


def test_unknown_paths_and_methods(server: Server) -> None:
    """Guards the framework's own shape for these two, which clients know."""
    assert server.http.get("/v1/nothing").json() == {"detail": "Not Found"}
    assert server.http.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("stream", [False, True])
def test_engine_refusals(server: Server, stream: bool) -> None:
    """Guards overload and a dead engine: a status and Retry-After, not a stream that begins with 200."""
    server.engine.fail = OverloadedError("The queue is full; try again later.", retry_after_s=2.3)
    response = server.post("/v1/completions", prompt="x", stream=stream)
    assert refused(response, 503)["message"] == "The queue is full; try again later."
    assert response.headers["retry-after"] == "3"
    server.engine.fail = EngineDeadError("The engine has ended.")
    refused(server.post("/v1/completions", prompt="x", stream=stream), 503)
    server.engine.fail = RuntimeError("secret at 0xdeadbeef in /root/key.py")
    assert "secret" not in refused(server.post("/v1/completions", prompt="x", stream=stream), 500)["message"]


def test_engine_error_in_the_middle(server: Server) -> None:
    """Guards a request that fails after its first tokens: 500, or an error event and the end mark."""
    server.engine.error_after = 2
    assert refused(server.post("/v1/completions", prompt="x"), 500)["message"] == "The step failed."
    chunks = events(server.post("/v1/completions", prompt="x", stream=True))
    assert len(chunks) == 3 and chunks[-1]["error"]["message"] == "The step failed."
    chunks = events(server.post("/v1/completions", prompt=["x", "y"], stream=True))
    assert chunks[-1]["error"]["code"] == 500


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("body", [{}, {"n": 3}], ids=["one", "three"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_aborts(server: Server, path: str, stream: bool, body: dict[str, Any]) -> None:
    """Guards blocks held for clients that left: every choice of the call is aborted, streaming or not."""
    server.engine.delay_s = 0.05
    server.engine.reply = lambda request: [65] * 400
    body = body | {"max_tokens": 400, "stream": stream}
    body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    with httpx.Client(base_url=server.url) as client:
        if stream:
            with client.stream("POST", path, json=body) as response:
                assert next(response.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.3)
    ids = {request.request_id for request in server.engine.submitted}
    assert len(ids) == body.get("n", 1)
    assert wait_until(lambda: ids <= set(server.engine.aborted))
    assert wait_until(lambda: server.app.state.context.metrics.in_flight == 0)


def test_finished_requests_are_not_aborted(server: Server) -> None:
    """Guards against aborts sent for requests that the engine has already finished."""
    server.post("/v1/completions", prompt="x")
    events(server.post("/v1/completions", prompt=["x", "y"], stream=True))
    assert server.engine.aborted == []
    assert server.app.state.context.metrics.in_flight == 0


def post_with_key(server: Server, authorization: str) -> tuple[int, bytes]:
    """POST a completion with a header value that httpx would refuse to send."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    headers = {"Authorization": authorization, "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body=b'{"prompt": "x"}', headers=headers)
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_keys(make_server: MakeServer) -> None:
    """Guards --api-key: every route of the table but the probes, and the salt that keeps tenants' caches apart."""
    server = make_server(server={"api_key": ["alpha", "beta"]})
    open_paths = {"/livez", "/readyz", "/health", "/ping"}
    paths = {route.path: route.methods for route in server.app.routes}
    assert open_paths < set(paths) and "/metrics" in paths and "/docs" in paths
    for path, methods in paths.items():
        for method in methods - {"OPTIONS"}:
            status = server.http.request(method, path).status_code
            assert (status == 401) == (path not in open_paths), (method, path, status)
    body = {"prompt": "x"}
    wrong = ["", "Bearer", "Bearer ", "Bearer gamma", "Basic alpha", "alpha", "Bearer alph", "Bearer alphaa"]
    for value in wrong:
        assert post_with_key(server, value) == (401, b'{"error":"Unauthorized"}')
    for value in ("Bearer alpha", "bearer beta", "BEARER  alpha"):
        assert post_with_key(server, value)[0] == 200
    salts = [request.cache_salt for request in server.engine.submitted]
    assert salts[0] == salts[2] != salts[1]
    headers = {"Authorization": "Bearer alpha"}
    server.http.post("/v1/completions", json=body | {"cache_salt": "s"}, headers=headers)
    assert server.engine.submitted[-1].cache_salt not in salts
    assert "alpha" not in json.dumps(salts)


def test_prompts_are_not_logged(make_server: MakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """Guards privacy: request logging names ids and parameters, never what people wrote."""
    with caplog.at_level("DEBUG"):
        server = make_server(server={"enable_log_requests": True})
        answer = server.post("/v1/completions", prompt="a very private prompt", seed=4711)
    assert answer.json()["id"] in caplog.text and "4711" in caplog.text
    assert "private" not in caplog.text


def test_no_key_accepts_any_header(server: Server) -> None:
    """Guards lm_eval, which sends an empty bearer when it has no key."""
    assert post_with_key(server, "Bearer ")[0] == 200
    assert server.engine.submitted[0].cache_salt == ""


def test_request_ids(make_server: MakeServer) -> None:
    """Guards X-Request-Id: it names the answer and comes back, while the engine's ids stay unique."""
    server = make_server(server={"enable_request_id_headers": True})
    for _ in range(2):
        response = server.http.post(
            "/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine-1"}
        )
        assert response.json()["id"] == "cmpl-mine-1"
        assert response.headers["x-request-id"] == "mine-1"
    assert len({request.request_id for request in server.engine.submitted}) == 2
    assert server.post("/v1/completions", prompt="x", request_id="body").json()["id"] == "cmpl-body"
    assert len(server.post("/v1/completions", prompt="x").headers["x-request-id"]) == 32


def test_probes_tell_the_truth(server: Server) -> None:
    """Guards honest probes: a stalled engine is alive but not ready, a dead one neither."""
    states = [
        (Health(True, True), 200, 200),
        (Health(False, True, "The engine has not finished a step for 12 s.", 12.0), 200, 503),
        (Health(False, False, "The engine process ended."), 503, 503),
    ]
    for state, live, ready in states:
        server.engine.state = state
        assert server.http.get("/livez").status_code == live
        for path in ("/readyz", "/health", "/ping"):
            response = server.http.get(path)
            assert response.status_code == ready
            assert response.json()["reason"] == state.reason
        assert server.http.post("/ping").status_code == ready
