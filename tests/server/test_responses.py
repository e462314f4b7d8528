"""/v1/responses with the openai client: text, events, tools, parsed output, conversations, storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from outrider.server.response_store import ResponseStore, StoredResponse
from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import Server

EOT = 1000
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


class Answer(BaseModel):
    """A parsed output."""

    n: int


def client(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def script(tokenizer: Tokenizer, *turns: str) -> Callable[[Any], list[int]]:
    """Answers with one turn after the other, the last one again and again."""
    ids = [[*tokenizer.encode(turn, add_special_tokens=False), EOT] for turn in turns]
    count = iter(range(10**6))
    return lambda request: ids[min(next(count), len(ids) - 1)]


def prompt_text(server: Server, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(server.engine.submitted[-1].prompt_token_ids)


def test_text_and_usage(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """The plain case, and instructions reach the prompt as a system message."""
    server = make_server(script(tokenizer, "Hello there."))
    response = client(server).responses.create(model="tiny", input="Hi", instructions="Be kind")
    assert (response.status, response.output_text) == ("completed", "Hello there.")
    assert response.output[0].type == "message" and response.output[0].status == "completed"
    assert response.usage is not None
    assert response.usage.input_tokens == len(server.engine.submitted[-1].prompt_token_ids)
    assert response.usage.output_tokens == len(tokenizer.encode("Hello there.", add_special_tokens=False)) + 1
    text = prompt_text(server, tokenizer)
    assert text.index("system") < text.index("Be kind") < text.index("Hi")


def test_a_cut_answer_is_incomplete(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """max_output_tokens must show in status and reason, whole and streamed."""
    server = make_server(script(tokenizer, "A rather long answer about nothing."))
    whole = client(server).responses.create(model="tiny", input="Hi", max_output_tokens=3)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client(server).responses.create(model="tiny", input="Hi", max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == whole.output_text


def test_the_stream_helper_accepts_the_events(
    make_server: Callable[..., Server], tokenizer: Tokenizer
) -> None:
    """Typed events in order, numbered without gaps; deltas add up to the final object."""
    server = make_server(script(tokenizer, "Streaming works well."))
    with client(server).responses.stream(model="tiny", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1 and "".join(deltas) == final.output_text == "Streaming works well."
    raw = server.post("/v1/responses", input="Hi", stream=True).text
    assert raw.startswith("event: response.created\ndata: {") and "[DONE]" not in raw


def test_tools_round_trip(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """A call comes out as its own item, streamed and whole; its output continues the conversation."""
    server = make_server(script(tokenizer, 'Well. [get_weather(city="Rome")]', "It is sunny."))
    api = client(server)
    response = api.responses.create(model="tiny", input="Weather?", tools=[TOOL])
    assert [item.type for item in response.output] == ["message", "function_call"]
    call: Any = response.output[1]
    assert (call.name, json.loads(call.arguments), call.status) == (
        "get_weather",
        {"city": "Rome"},
        "completed",
    )
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = api.responses.create(
        model="tiny", previous_response_id=response.id, input=[output], tools=[TOOL]
    )
    assert second.output_text == "It is sunny."
    text = prompt_text(server, tokenizer)
    assert text.index("Weather?") < text.index("Well.") < text.index("sunny")
    items: Any = [{"role": "user", "content": "Weather?"}, *[i.to_dict() for i in response.output], output]
    api.responses.create(model="tiny", input=items, tools=[TOOL])
    assert prompt_text(server, tokenizer) == text, "items sent back and the stored ones make the same prompt"


def test_streamed_calls(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """The stream helper assembles the arguments of each call."""
    server = make_server(script(tokenizer, '[get_weather(city="Rome"), get_weather(city="Oslo")]'))
    with client(server).responses.stream(model="tiny", input="Hi", tools=[TOOL]) as stream:
        done = [e for e in stream if e.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert [json.loads(e.arguments)["city"] for e in done] == ["Rome", "Oslo"]
    assert [json.loads(item.arguments)["city"] for item in final.output] == ["Rome", "Oslo"]  # type: ignore[union-attr]


def test_forced_tools_and_parse_are_constrained(
    make_server: Callable[..., Server], tokenizer: Tokenizer
) -> None:
    """text.format and tool_choice become grammars."""
    server = make_server(script(tokenizer, '{"n": 41}'))
    parsed = client(server).responses.parse(model="tiny", input="Count", text_format=Answer)
    assert parsed.output_parsed == Answer(n=41)
    grammar = server.engine.submitted[-1].sampling.grammar
    assert grammar is not None and json.loads(grammar.text)["properties"]["n"]["type"] == "integer"
    client(server).responses.create(
        model="tiny", input="x", tools=[TOOL], tool_choice={"type": "function", "name": "get_weather"}
    )
    grammar = server.engine.submitted[-1].sampling.grammar
    assert grammar is not None and "get_weather" in grammar.text


def test_storage(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """GET returns what create returned; store=false and delete leave nothing behind."""
    server = make_server(script(tokenizer, "Kept."))
    api = client(server)
    made = api.responses.create(model="tiny", input="Hi")
    assert api.responses.retrieve(made.id).to_dict() == made.to_dict()
    lost = api.responses.create(model="tiny", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(lost.id)
    api.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.create(model="tiny", input="more", previous_response_id=made.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.cancel("resp_none")


def test_background_and_cancel(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """A background response is polled by id; a cancelled one stays cancelled."""
    server = make_server(script(tokenizer, "In the background."))
    api = client(server)
    made = api.responses.create(model="tiny", input="Hi", background=True)
    for _ in range(200):
        if (now := api.responses.retrieve(made.id)).status != "in_progress":
            break
    assert (now.status, now.output_text) == ("completed", "In the background.")
    with pytest.raises(openai.BadRequestError):
        api.responses.cancel(made.id)
    server.engine.delay_s = 5
    slow = api.responses.create(model="tiny", input="Hi", background=True)
    assert api.responses.cancel(slow.id).status == "cancelled"
    assert api.responses.retrieve(slow.id).status == "cancelled"


def test_keys_do_not_see_each_other(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """A response belongs to the key that made it, whatever ids other clients send."""
    server = make_server(script(tokenizer, "Mine."), server={"api_key": ["alpha-key", "beta-key"]})
    made = client(server, "alpha-key").responses.create(model="tiny", input="secret")
    with pytest.raises(openai.NotFoundError):
        client(server, "beta-key").responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client(server, "beta-key").responses.create(model="tiny", input="x", previous_response_id=made.id)
    forged = {"x-request-id": made.id.removeprefix("resp_")}
    client(server, "beta-key").responses.create(model="tiny", input="x", extra_headers=forged)
    assert client(server, "alpha-key").responses.retrieve(made.id).output_text == "Mine."


@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors(make_server: Callable[..., Server], tokenizer: Tokenizer, stream: bool) -> None:
    """An error after the headers is a response.failed event, before them an HTTP status."""
    server = make_server(script(tokenizer, "Never finished text."))
    server.engine.error_after = 1
    if stream:
        events = list(client(server).responses.create(model="tiny", input="Hi", stream=True))
        assert events[-1].type == "response.failed" and events[-1].response.error is not None
    else:
        with pytest.raises(openai.InternalServerError):
            client(server).responses.create(model="tiny", input="Hi")


BAD: list[dict[str, Any]] = [
    {"input": []},
    {"input": "x", "n": 2},
    {"input": "x", "max_output_tokens": 0},
    {"input": "x", "truncation": "auto"},
    {"input": "x", "conversation": "conv_1"},
    {"input": "x", "tool_choice": "required"},
    {"input": "x", "tool_choice": {"type": "function", "name": "f"}, "tools": []},
    {"input": "x", "prompt": {"id": "pmpt_1"}},
    {"input": "x", "tools": [{"type": "web_search"}]},
    {"input": "x", "background": True, "stream": True},
    {"input": [{"type": "item_reference", "id": "y"}]},
    {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    {"input": [{"role": 7, "content": "x"}]},
    {"input": [{"type": "function_call", "name": 1, "arguments": "{"}]},
    {"input": "x", "text": {"format": {"type": "xml"}}},
    {"input": "x", "text": {"format": 3}},
    {"input": "x", "tool_choice": "required", "tools": [TOOL], "text": {"format": {"type": "json_object"}}},
]


@pytest.mark.parametrize("body", BAD)
def test_what_cannot_be_served_is_refused(server: Server, body: dict[str, Any]) -> None:
    """400 with a sentence, never 500 and never silence."""
    answer = server.post("/v1/responses", **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].endswith(".")
    assert server.engine.submitted == []


def test_the_store_is_bounded() -> None:
    """Bytes and number: the oldest responses make room, an oversized one is not kept."""
    store = ResponseStore(max_bytes=10_000, max_responses=20)
    for i in range(100):
        store.put(StoredResponse({"id": f"r{i}", "x": "y" * 200}, [], ""))
    assert 10 <= len(store._entries) <= 20
    store.put(StoredResponse({"id": "big", "x": "y" * 20_000}, [], ""))
    assert "big" not in store._entries and store._num_bytes <= 10_000
