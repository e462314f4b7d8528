"""One request's misfortune is its own: cancels, faults, poison and fuzz leave the others and the ledger alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.engine.scheduler import FAILED, NOT_FINITE
from tests.reliability.server import LEAKS, SMALL, TINY, Server, scaled, start_streams, until

CONTROL = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def control(server: Server) -> str:
    """The answer that must never change."""
    answer = server.post("/v1/completions", CONTROL)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def leaks(answer: httpx.Response, sent: str = "") -> bool:
    """Whether an error shows a path, an address, a class name or a traceback.

    Its type is part of the API, and what the client ``sent`` it may read again.
    """
    text = answer.text.split('"type":')[0] if '"error"' in answer.text else answer.text
    return any(found[0] not in sent for found in LEAKS.finditer(text))


# -- cancel ------------------------------------------------------------------------------------------


def test_disconnects_leave_the_ledger_whole(server: Server) -> None:
    """Guards against blocks that leak when clients leave: at any moment, streaming or not, with several choices."""
    rng = random.Random(3)

    async def one(client: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"prompt": [rng.randrange(900) for _ in range(rng.randrange(1, 90))]}
        body |= {
            "max_tokens": rng.randrange(1, 300),
            "stream": rng.random() < 0.5,
            "n": rng.choice((1, 1, 3)),
        }
        body |= {"temperature": 1, "ignore_eos": True}
        try:
            await asyncio.wait_for(client.post("/v1/completions", json=body), rng.random() * 0.4)
        except (TimeoutError, httpx.HTTPError):
            return

    async def all_of_them(count: int) -> None:
        gate = asyncio.Semaphore(24)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def gated() -> None:
                async with gate:
                    await one(client)

            await asyncio.gather(*(gated() for _ in range(count)))

    before = control(server)
    asyncio.run(all_of_them(scaled(300, 10_000)))
    server.wait_idle(60)
    assert control(server) == before


def test_half_a_body_is_no_error(server: Server) -> None:
    """Guards against a traceback in the log for every client that leaves while it still sends."""
    start = len(server.lines)
    for length in (0, 3):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(head + b"Content-Length: 100\r\n\r\n" + b'{"a'[:length])
            time.sleep(0.3)
    assert server.complete().status_code == 200
    assert "Traceback" not in "".join(server.lines[start:])


def test_blocks_are_free_within_a_step(server: Server) -> None:
    """Guards against work for clients that are gone: while another stream runs on, the blocks come back at once."""
    threads, outs = start_streams(server.url, 1, max_tokens=120)
    until(lambda: len(outs[0]) > 2, 20, "the stream that stays")
    alone = server.stats()["kv_blocks_used"]
    body = {"prompt": list(range(300)), "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=30) as response:
        chunks = response.iter_bytes()
        next(chunks)
        until(lambda: server.stats()["kv_blocks_used"] > alone + 10, 20, "blocks of the prompt")
        during = server.stats()
    until(lambda: server.stats()["num_running"] <= 1, 5, "the abort")
    after = server.stats()
    assert after["kv_blocks_used"] < during["kv_blocks_used"] - 10
    # The disconnect travels to the engine; how many steps passed meanwhile depends on the machine, not on the length.
    assert after["steps"] - during["steps"] < 60
    threads[0].join(60)


# -- faults inside -----------------------------------------------------------------------------------


def test_exceptions_end_their_request_only() -> None:
    """Guards against one exception that takes the engine down: while taking in, launching, or reading a token."""
    faults = {"FAULT_ADD_AT": "13", "FAULT_COMMIT_AT": "14", "FAULT_LAUNCH_AT": "15"}
    with Server(*SMALL, env=faults) as server:
        pid, before = server.engine_pid, control(server)
        threads, outs = start_streams(server.url, 4, max_tokens=150)
        until(lambda: all(len(out) > 2 for out in outs), 20, "the others")
        for poison in (13, 14, 15):
            for stream in (False, True):
                answer = server.complete([9, 9, 9], max_tokens=poison, stream=stream)
                assert FAILED in answer.text, (poison, answer.text)
                assert not leaks(answer), answer.text
        for thread in threads:
            thread.join(90)
        # A step that cannot be launched ends the requests in it: those that decoded beside the poison.
        for out in outs:
            last = out[-2]
            assert out[-1] == "[DONE]" and ("error" not in last or last["error"]["message"] == FAILED)
        assert server.engine_pid == pid and control(server) == before
        assert "a secret at 0x" in server.log, "the log says what happened"
        server.wait_idle()


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an embedding of NaN for token 700."""
    folder = tmp_path_factory.mktemp("poisoned")
    for file in TINY.iterdir():
        shutil.copy(file, folder / file.name)
        (folder / file.name).chmod(0o644)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("embed_tokens.weight"):
                tensor[700] = torch.nan
                save_file(tensors, file)
                return folder
    raise AssertionError("no embedding")


def test_values_that_are_not_finite_end_their_request_only(poisoned_model: Path) -> None:
    """Guards against NaN that spreads: to the batch, to later users of its blocks, or to the client as text."""
    with Server(*SMALL, model=poisoned_model) as server:
        before = control(server)
        threads, outs = start_streams(server.url, 3, prompt=[5, 6, 7, 8], max_tokens=60)
        for _ in range(6):
            answer = server.complete([3, 700, 4] * 40)
            assert answer.status_code == 500 and answer.json()["error"]["message"] == NOT_FINITE
        for thread in threads:
            thread.join(60)
        texts = {"".join(event["choices"][0]["text"] for event in out[1:-1]) for out in outs}
        assert len(texts) == 1 and control(server) == before
        for _ in range(20):  # every block that held NaN is used again
            assert server.complete(list(range(100, 400)), max_tokens=2).status_code == 200
        assert control(server) == before
        server.wait_idle()


# -- fuzz --------------------------------------------------------------------------------------------

NUMBERS = [
    0,
    -1,
    1,
    2,
    2**31,
    2**63,
    2**64,
    -(2**63),
    1e308,
    -1e308,
    1e-320,
    0.5,
    "1",
    "x",
    None,
    True,
    [],
    {},
]
TEXTS = ["", "\0", "a" * 5000, "<|eot|><|image|><|header_start|>", "\ud7ff\U0010ffff", "${jndi:x}", "é" * 300]
SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "(" * 500},
    {"$ref": "http://a.example/x"},
    {"enum": list(range(5000))},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    [],
    "x",
    7,
]
IMAGES = [
    "data:image/png;base64,AAAA",
    "data:image/png;base64,",
    "http://169.254.169.254/x.png",
    "file:///etc/passwd",
    "x",
]
FIELDS = (
    "max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "seed", "logprobs",
    "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "stream",
    "prompt_logprobs", "truncate_prompt_tokens", "priority", "cache_salt", "echo", "suffix", "user", "request_id",
    "stream_options", "response_format", "structured_outputs", "skip_special_tokens", "model", "top_logprobs",
)  # fmt: skip


def junk(rng: random.Random) -> Any:
    """Any JSON value, mostly near the edges."""
    kind = rng.randrange(6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return [junk(rng) for _ in range(rng.randrange(4))]
    return {rng.choice((*FIELDS, "1", "-1", "type", "99999")): junk(rng) for _ in range(rng.randrange(3))}


def hostile(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body that somebody might send to hurt."""
    body: dict[str, Any] = {"max_tokens": rng.randrange(1, 9)}
    body |= {name: junk(rng) for name in rng.sample(FIELDS, rng.randrange(3))}
    path = rng.choice(
        ("/v1/completions", "/v1/chat/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
    )
    if path == "/v1/chat/completions":
        image = {"type": "image_url", "image_url": {"url": rng.choice(IMAGES)}}
        content = rng.choice(
            (*TEXTS, [image], [{"type": "text", "text": rng.choice(TEXTS)}, image], junk(rng))
        )
        body["messages"] = rng.choice(
            ([{"role": rng.choice(("user", "system", "x")), "content": content}], junk(rng))
        )
        if rng.random() < 0.3:
            body["tools"] = rng.choice(
                ([{"type": "function", "function": {"name": "f", "parameters": junk(rng)}}], junk(rng))
            )
    elif path == "/detokenize":
        body["tokens"] = rng.choice(([rng.randrange(2000)], [2**63], [-1], junk(rng)))
    else:
        body["prompt"] = rng.choice((*TEXTS, [1, 2, 3], [rng.randrange(3000)], [[1], [2]], junk(rng)))
    if rng.random() < 0.15:
        schema = {"name": "s", "schema": rng.choice(SCHEMAS)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    raw = json.dumps(body).encode()
    if rng.random() < 0.05:  # bytes that are no JSON
        raw = raw[: rng.randrange(len(raw))] + bytes(rng.randrange(256) for _ in range(3))
    return path, raw


Call = tuple[str, str, dict[str, Any]]
"""A method, a path and httpx's arguments."""


def fuzz(server: Server, calls: Iterator[Call]) -> dict[int, int]:
    """Send ``calls`` 64 at a time, and the control request all the while; returns how often each status was seen."""
    before = control(server)
    controls: list[str] = []
    statuses: dict[int, int] = {}
    bad: list[Any] = []

    async def worker(client: httpx.AsyncClient) -> None:
        for method, path, arguments in calls:
            answer = await client.request(method, path, **arguments)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code == 500 or (answer.status_code >= 400 and leaks(answer, str(arguments))):
                bad.append((path, arguments, answer.status_code, answer.text))

    async def watch(client: httpx.AsyncClient, workers: list[asyncio.Task[None]]) -> None:
        while not all(worker.done() for worker in workers):
            answer = await client.post("/v1/completions", json=CONTROL)
            if answer.status_code == 200:
                controls.append(answer.json()["choices"][0]["text"])
            await asyncio.sleep(0.2)

    async def load() -> None:
        limits = httpx.Limits(max_connections=80)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            workers = [asyncio.create_task(worker(client)) for _ in range(64)]
            await asyncio.gather(*workers, watch(client, workers))

    asyncio.run(load())
    assert not bad, [(path, status, text[-300:]) for path, _, status, text in bad[:9]]
    assert set(controls) == {before}
    server.wait_idle(60)
    return statuses


def test_fuzz_at_load(server: Server) -> None:
    """Guards against inputs that stop the engine, hang a request, change another's output, or are answered with 500."""
    rng = random.Random(5)
    headers = {"content-type": "application/json"}

    def call() -> Call:
        path, raw = hostile(rng)
        return "POST", path, {"content": raw, "headers": headers}

    statuses = fuzz(server, (call() for _ in range(scaled(640, 10_048))))
    assert statuses.get(200, 0) > 20 and statuses.get(400, 0) > 100, statuses


def sent_as(made: dict[str, Any]) -> Call:
    """A generated case; those that name no length are short, so that the run is about inputs."""
    arguments = {name: made[name] for name in ("headers", "params", "json", "cookies") if made.get(name)}
    if isinstance(made.get("json"), dict):
        lengths = {"max_output_tokens": 2} if "input" in made["json"] else {"max_tokens": 2}
        arguments["json"] = {**lengths, **made["json"]}
    if made.get("data"):
        arguments["content"] = made["data"]
    return made["method"], made["url"], arguments


def test_fuzz_by_the_openapi_page(server: Server) -> None:
    """Guards against a page that says other than the decoder, and against what its schemas allow or just not allow."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    page = server.get("/openapi.json").json()
    operations = [o.ok() for o in schemathesis.openapi.from_dict(page).get_all_operations()]
    assert len(operations) == sum(len(methods) for methods in page["paths"].values()) >= 20
    cases: list[Any] = []
    with_bodies = [o for o in operations if o.method.upper() == "POST" and o.body]
    assert len(with_bodies) == 5
    for operation in with_bodies:
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=scaled(4, 1000), deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(operation.as_strategy(generation_mode=mode))
            def collect(case: Any) -> None:
                cases.append(case)

            with contextlib.suppress(Unsatisfiable):
                collect()
    calls = [sent_as(case.as_transport_kwargs()) for case in cases]
    assert len(calls) > scaled(30, 9000)
    statuses = fuzz(server, iter(calls))
    documented = {int(status) for status in page["paths"]["/v1/completions"]["post"]["responses"]}
    assert statuses.keys() <= documented, statuses


# -- a small pool ------------------------------------------------------------------------------------


def test_small_pool_gives_the_same_outputs() -> None:
    """Guards against deadlocks and wrong tokens when the KV cache is nearly always full."""
    rng = random.Random(8)
    count = scaled(60, 500)
    bodies = [
        {
            "prompt": [rng.randrange(900) for _ in range(rng.randrange(1, 40))],
            "max_tokens": rng.randrange(1, 20),
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(count)
    ]

    async def answers(url: str) -> list[str]:
        async with httpx.AsyncClient(
            base_url=url, timeout=300, limits=httpx.Limits(max_connections=48)
        ) as client:
            got = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        return [answer.json()["choices"][0]["text"] for answer in got]

    flags = (
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "48",
        "--deterministic",
        "--max-num-batched-tokens",
        "64",
    )
    outputs = []
    for blocks in ("1600", "32"):
        with Server(*flags, "--num-gpu-blocks-override", blocks) as server:
            outputs.append(asyncio.run(answers(server.url)))
            server.wait_idle()
    assert outputs[0] == outputs[1]
