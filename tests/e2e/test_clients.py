"""Many clients, clients that leave, clients that are wrong."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

from tests.e2e.conftest import MAX_MODEL_LEN
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_greedy import MODEL, PROMPTS

CLIENTS, TOKENS = 64, 64


async def _stream(client: openai.AsyncOpenAI, prompt: str) -> tuple[str, int]:
    text, tokens = "", 0
    answer = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in answer:
        text += chunk.choices[0].text if chunk.choices else ""
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, tokens


def test_64_streams_at_once(embedded: ServerProcess) -> None:
    """Guards the full batch: no stream fails, comes back short, or differs from an equal one beside it."""

    async def run() -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{embedded.url}/v1", api_key="EMPTY", max_retries=0, timeout=240
        ) as client:
            return await asyncio.gather(*(_stream(client, PROMPTS[i % 4]) for i in range(CLIENTS)))

    results = asyncio.run(run())
    assert [tokens for _, tokens in results] == [TOKENS] * CLIENTS
    for i, (text, _) in enumerate(results):
        assert text == results[i % 4][0]
    embedded.until_idle(3)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_blocks(embedded: ServerProcess, stream: bool) -> None:
    """Guards against generating for nobody: minutes of work are dropped when the connection closes."""
    body = {"prompt": PROMPTS[0], "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=embedded.url, timeout=60) as client:
            if stream:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data:"):
                            return
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.5)
            task.cancel()

    before = embedded.metric("generation_tokens_total")
    asyncio.run(leave())
    embedded.until_idle(5)
    time.sleep(0.3)
    done = embedded.metric("generation_tokens_total")
    assert done - before < 300
    time.sleep(0.3)
    assert embedded.metric("generation_tokens_total") == done


def test_many_leave_at_random_moments(embedded: ServerProcess) -> None:
    """Guards the books under aborts in every state: waiting, in prefill, decoding, beside others that finish."""

    async def visit(client: httpx.AsyncClient, number: int) -> int | None:
        body = {"prompt": PROMPTS[number % 5] * (1 + number % 7), "max_tokens": 24, "ignore_eos": True}
        task = client.post("/v1/completions", json=body)
        if number % 3 == 0:
            return (await task).json()["usage"]["completion_tokens"]
        try:
            return (await asyncio.wait_for(task, 0.05 * (number % 11))).status_code and None
        except TimeoutError:
            return None

    async def run() -> list[int | None]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=embedded.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(visit(client, i) for i in range(48)))

    results = asyncio.run(run())
    assert [tokens for i, tokens in enumerate(results) if i % 3 == 0] == [24] * 16
    embedded.until_idle(5)


def test_mistakes_are_told_in_one_sentence(client: openai.OpenAI, embedded: ServerProcess) -> None:
    """Guards the errors that clients act on: type, status, and the number that would have worked."""
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_MODEL_LEN} tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 2040, max_tokens=9)
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], temperature=9
        )
    with pytest.raises(openai.BadRequestError, match="49152"):
        client.completions.create(model=MODEL, prompt=[49152])
    assert embedded.http.get("/v1/nothing").status_code == 404
    assert embedded.http.get("/v1/completions").status_code == 405
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices[0].finish_reason


def test_the_small_endpoints(client: openai.OpenAI, embedded: ServerProcess) -> None:
    """Guards what dashboards and clients ask first: the model's name and length, the version, the chosen kernels."""
    (model,) = client.models.list().data
    assert model.id == MODEL and model.model_extra["max_model_len"] == MAX_MODEL_LEN  # type: ignore[index]
    assert embedded.http.get("/health").json()["status"] == "ok"
    info = embedded.http.get("/server_info").json()["engine"]
    assert info["dtype"] == "float32" and info["kernels"]
    ready = next(line for line in embedded.log if "KV cache" in line)
    assert f"requests of {MAX_MODEL_LEN:,}" in ready and info["device"] in ready
    ids = embedded.post("/tokenize", prompt="Hello  world\n").json()["tokens"]
    assert embedded.post("/detokenize", tokens=ids).json() == {"prompt": "Hello  world\n"}
