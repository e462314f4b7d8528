"""Answers against the ``openai`` package's own types, validated strictly: its client builds objects without checking.

Every JSON object that the server sends must be one that OpenAI's published types allow, whole and streamed; the
stream helpers, which keep state across chunks, must come to the same end as the whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import Server

MakeServer = Callable[..., Server]
ASK: Any = [{"role": "user", "content": "Weather in Rome and Oslo?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
FLAT_TOOLS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
CALLS = 'Looking. [get_weather(city="Rome", days=2), now()]'
TEXT = 'Grüße, "friend" 漢字.'
CHAT_BODIES: list[dict[str, Any]] = [
    {},
    {"n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2},
    {"tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "none", "logprobs": True},
    {"max_completion_tokens": 3, "stop": ["never"], "user": "u", "metadata": {"a": "b"}, "store": True},
    {"service_tier": "auto", "reasoning_effort": "low", "modalities": ["text"], "prediction": None},
]


class Person(BaseModel):
    """A structured answer."""

    name: str
    age: int


class GetWeather(BaseModel):
    """A tool whose arguments are parsed."""

    city: str
    days: int | None = None


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def events(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = server.post(path, stream=True, **body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def validate(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``, no coercion: a float is no int, a missing key is an error."""
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)


@pytest.mark.parametrize("text", [TEXT, CALLS, ""])
@pytest.mark.parametrize("body", CHAT_BODIES)
def test_chat_objects_are_openais(make_server: MakeServer, text: str, body: dict[str, Any]) -> None:
    """Guards every chat object, and that a stream adds up to the whole answer."""
    server = make_server([*server_ids(make_server, text), 1000])
    whole = validate(ChatCompletion, server.post("/v1/chat/completions", messages=ASK, **body).json())
    usage = {"stream_options": {"include_usage": True}}
    chunks = events(server, "/v1/chat/completions", messages=ASK, **body, **usage)
    parsed = [validate(ChatCompletionChunk, chunk) for chunk in chunks]
    assert parsed[-1].choices == [] and parsed[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [c for chunk in parsed for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == (choice.message.content or "")
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]  # type: ignore[union-attr]
        assert streamed_calls(mine) == calls
        if body.get("logprobs"):
            assert choice.logprobs is not None and choice.logprobs.content
            entries = [e for c in mine if c.logprobs for e in c.logprobs.content or []]
            assert entries == choice.logprobs.content


def server_ids(make_server: MakeServer, text: str) -> list[int]:
    """Token ids of ``text``."""
    tokenizer: Tokenizer = make_server().app.state.context.tokenizer
    return tokenizer.encode(text, add_special_tokens=False)


def streamed_calls(choices: list[Any]) -> list[tuple[str, str]]:
    """Calls put together as strict clients do: id, type and name once and first, then arguments by index."""
    calls: dict[int, list[str]] = {}
    for choice in choices:
        for delta in choice.delta.tool_calls or []:
            if delta.index not in calls:
                assert delta.id and delta.type == "function" and delta.function.name
                calls[delta.index] = [delta.function.name, ""]
            else:
                assert delta.id is None and delta.function.name is None
            calls[delta.index][1] += delta.function.arguments or ""
    assert list(calls) == list(range(len(calls)))
    return [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize(
    "body", [{}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"n": 2, "temperature": 1}]
)
def test_completion_objects_are_openais(make_server: MakeServer, body: dict[str, Any]) -> None:
    """Guards text completions; a chunk may say null where only the last knows the finish reason."""
    server = make_server(TEXT)
    answers = [server.post("/v1/completions", prompt="x", max_tokens=50, **body).json()]
    chunks = events(server, "/v1/completions", prompt="x", max_tokens=50, **body)
    if body.get("echo"):  # nothing comes before the first prompt token, so its entries are null
        for choice in answers[0]["choices"] + chunks[0]["choices"]:
            assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
            choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
    whole = validate(Completion, answers[0])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice.index]
        assert "".join(c["text"] for c in mine) == choice.text
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice.finish_reason]
    for chunk in chunks:
        for c in chunk["choices"]:
            c["finish_reason"] = c["finish_reason"] or "stop"
        validate(Completion, chunk)
    for card in server.http.get("/v1/models").json()["data"]:
        validate(Model, card)


@pytest.mark.parametrize("text", [TEXT, CALLS, "[now()]", ""])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tools": FLAT_TOOLS, "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": [{**FLAT_TOOLS[0], "strict": True}], "reasoning": {"effort": "low"}},
        {"max_output_tokens": 2, "metadata": {"k": "v"}, "instructions": "Be kind", "user": "u"},
        {"text": {"format": {"type": "text"}, "verbosity": "low"}, "include": [], "service_tier": "auto"},
    ],
)
def test_response_objects_are_openais(make_server: MakeServer, text: str, body: dict[str, Any]) -> None:
    """Guards the response object and every typed event of a stream."""
    server = make_server([*server_ids(make_server, text), 1000])
    whole = validate(Response, server.post("/v1/responses", input="Weather?", **body).json())
    parsed = [
        validate(ResponseStreamEvent, event)
        for event in events(server, "/v1/responses", input="Weather?", **body)
    ]
    final = parsed[-1].response
    assert final.status == whole.status and final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.usage == whole.usage
    validate(Response, server.http.get(f"/v1/responses/{final.id}").json())


def test_chat_stream_helper(make_server: MakeServer) -> None:
    """``chat.completions.stream`` with parsed tools: events in order, arguments parsed, one final object."""
    server = make_server([*server_ids(make_server, 'Well. [GetWeather(city="Rome", days=2)]'), 1000])
    tools = [openai.pydantic_function_tool(GetWeather)]
    with client(server).chat.completions.stream(model="tiny", messages=ASK, tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert {"chunk", "content.delta", "content.done", "tool_calls.function.arguments.delta"} <= set(kinds)
    assert "tool_calls.function.arguments.done" in kinds
    (call,) = final.message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Rome", days=2)
    assert final.message.content == "Well." and final.finish_reason == "tool_calls"


def test_chat_stream_helper_parses_schemas(make_server: MakeServer) -> None:
    """``chat.completions.stream(response_format=Model)`` gives the object; a cut answer raises as OpenAI's does."""
    server = make_server([*server_ids(make_server, '{"name": "Ann", "age": 3}'), 1000])
    with client(server).chat.completions.stream(model="tiny", messages=ASK, response_format=Person) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ann", age=3)
    with pytest.raises(openai.LengthFinishReasonError):
        client(server).chat.completions.parse(
            model="tiny", messages=ASK, response_format=Person, max_tokens=3
        )


def test_responses_stream_helper(make_server: MakeServer) -> None:
    """``responses.stream(text_format=Model)`` and ``responses.parse`` with a parsed tool."""
    server = make_server([*server_ids(make_server, '{"name": "Ann", "age": 3}'), 1000])
    with client(server).responses.stream(model="tiny", input="Who?", text_format=Person) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == Person(name="Ann", age=3)
    caller = make_server([*server_ids(make_server, '[GetWeather(city="Rome", days=null)]'), 1000])
    tools: Any = [openai.pydantic_function_tool(GetWeather)]
    (call,) = client(caller).responses.parse(model="tiny", input="Weather?", tools=tools).output
    assert call.type == "function_call" and call.parsed_arguments == GetWeather(city="Rome")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_agent_loop(make_server: MakeServer, use_responses_api: bool, streaming: bool) -> None:
    """ChatOpenAI over both APIs: two parallel calls, both results back, a last answer; and structured output."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    tokenizer: Tokenizer = make_server().app.state.context.tokenizer
    texts = ['[get_weather(city="Rome"), now()]', "Sunny at noon.", '{"name": "Ann", "age": 3}']
    turns = iter([[*tokenizer.encode(text, add_special_tokens=False), 1000] for text in texts])
    server = make_server(lambda request: next(turns))
    model = ChatOpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        use_responses_api=use_responses_api,
        streaming=streaming,
        stream_usage=True,
    )
    messages: list[Any] = [HumanMessage("Weather and time?")]
    answer = model.bind_tools(TOOLS).invoke(messages)
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("get_weather", {"city": "Rome"}),
        ("now", {}),
    ]
    messages += [answer, *(ToolMessage("sunny", tool_call_id=call["id"]) for call in answer.tool_calls)]
    last = model.bind_tools(TOOLS).invoke(messages)
    assert last.text == "Sunny at noon." and last.usage_metadata["input_tokens"] > 0
    prompt = tokenizer.decode(server.engine.submitted[-1].prompt_token_ids)
    assert prompt.count("sunny") == 2 and prompt.index("Weather and time?") < prompt.index("sunny")
    person = model.with_structured_output(Person, method="json_schema").invoke("Who?")
    assert person == Person(name="Ann", age=3)


def test_a_template_without_tools_is_told_once(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a model that calls no tool because its template never shows it any, and nobody says so."""
    server = make_server("Hi.")
    for _ in range(2):
        assert server.post("/v1/chat/completions", messages=ASK, tools=TOOLS).status_code == 200
    assert sum("does not show them" in record.message for record in caplog.records) == 1
