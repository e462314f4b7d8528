"""Tool calling over HTTP with the openai client: scripted model text in, calls out, streamed and whole alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import openai
import pytest

from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import Server

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
MESSAGES: Any = [{"role": "user", "content": "Weather in Paris?"}]
FORCED = '[{"name": "get_weather", "parameters": {"city": "a}\\"]", "days": 2}}, {"name": "now", "parameters": {}}]'


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Server, **body: Any) -> Any:
    return client(server).chat.completions.create(
        model="tiny", messages=MESSAGES, **({"tools": [WEATHER, TIME]} | body)
    )


def streamed(server: Server, **body: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """Content, calls and finish reason, assembled as strict clients do: the first delta must carry everything."""
    content, calls, reason = "", [], None
    for chunk in ask(server, stream=True, **body):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                assert delta.id and delta.type == "function" and delta.function.name
                assert delta.function.arguments == ""
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                assert delta.index == len(calls) - 1 and delta.id is None and delta.function.name is None
                calls[-1]["arguments"] += delta.function.arguments
    return content, calls, reason


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[get_weather(city="Paris", days=2)]', None, [("get_weather", {"city": "Paris", "days": 2})]),
        (
            'Let me look.\n{"name": "now", "parameters": {}}; {"name": "get_weather", "arguments": {"city": "é"}}',
            "Let me look.",
            [("now", {}), ("get_weather", {"city": "é"})],
        ),
        ('{"name": "rm", "parameters": {}}', '{"name": "rm", "parameters": {}}', []),
        ("Just text.", "Just text.", []),
    ],
)
def test_auto_finds_the_calls_whole_and_streamed(
    make_server: Callable[..., Server],
    text: str,
    content: str | None,
    calls: list[tuple[str, dict[str, Any]]],
) -> None:
    """No flag is needed; streaming and not give the same calls and the same finish reason."""
    server = make_server(text)
    choice = ask(server, max_tokens=400).choices[0]
    found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]
    assert (choice.message.content, found) == (content, calls)
    # the script ends by length, not by an end token: calls must not hide a cut-off answer
    text_streamed, calls_streamed, reason = streamed(server, max_tokens=400)
    assert reason == choice.finish_reason
    assert text_streamed == (content or "")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls_streamed] == calls
    ids = [c.id for c in choice.message.tool_calls or []]
    assert all(re.fullmatch(r"chatcmpl-tool-[0-9a-f]{32}", i) for i in ids) and len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("choice", "reason"), [("auto", "tool_calls"), ("required", "tool_calls"), ("named", "stop")]
)
def test_finish_reasons(
    make_server: Callable[..., Server], tokenizer: Tokenizer, choice: str, reason: str
) -> None:
    """``tool_calls`` when the model chose, ``stop`` when the client named the tool."""
    ids = [*tokenizer.encode(FORCED, add_special_tokens=False), 1000]
    server = make_server(ids)
    named = {"type": "function", "function": {"name": "get_weather"}}
    body = {"tool_choice": named if choice == "named" else choice, "max_tokens": 400}
    answer = ask(server, **body).choices[0]
    _, calls, streamed_reason = streamed(server, **body)
    assert answer.finish_reason == streamed_reason == reason
    assert answer.message.content == (None if choice == "auto" else "")
    for call in (answer.message.tool_calls[0].function, calls[0]):
        arguments = call["arguments"] if isinstance(call, dict) else call.arguments
        assert json.loads(arguments) == {"city": 'a}"]', "days": 2}
    assert len(calls) == 2


def test_forced_calls_are_constrained(make_server: Callable[..., Server]) -> None:
    """The engine gets a grammar with each tool's schema; ``auto`` and ``none`` leave the model free."""
    server = make_server(FORCED)
    for choice, names in (
        ("required", ["get_weather", "now"]),
        ({"type": "function", "function": {"name": "now"}}, ["now"]),
    ):
        ask(server, tool_choice=choice)
        grammar = server.engine.submitted[-1].sampling.grammar
        assert grammar is not None
        assert [n for n in ("get_weather", "now") if n in grammar.text] == names
    for choice in ("auto", "none"):
        ask(server, tool_choice=choice)
        assert server.engine.submitted[-1].sampling.grammar is None
    assert ask(server, tool_choice="none", max_tokens=400).choices[0].message.content == FORCED


def test_parallel_tool_calls_false_keeps_the_first(make_server: Callable[..., Server]) -> None:
    """Clients that can run one call at a time must get one."""
    server = make_server('[get_weather(city="a"), now()]')
    message = ask(server, parallel_tool_calls=False, max_tokens=400).choices[0].message
    assert [c.function.name for c in message.tool_calls] == ["get_weather"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "1 to 128"),
    ({"tools": [WEATHER] * 2}, "repeats"),
    ({"tools": [{"type": "function", "function": {"name": f"t{i}"}} for i in range(129)]}, "1 to 128"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters"),
    ({"tools": [{"type": "retrieval"}]}, "function"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "schema"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "nope"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("body", "word"), BAD)
def test_bad_tools_are_refused(server: Server, body: dict[str, Any], word: str) -> None:
    """Each wrong definition is a 400 with a sentence, before anything reaches the engine."""
    with pytest.raises(openai.BadRequestError, match=word):
        ask(server, **body)
    assert server.engine.submitted == []


def test_tool_choice_needs_tools(server: Server) -> None:
    """``tool_choice`` without tools is a client's mistake, not free text."""
    response = server.post("/v1/chat/completions", messages=MESSAGES, tool_choice="auto")
    assert response.status_code == 400 and "tools" in response.json()["error"]["message"]


def test_langchain_tool_loop(make_server: Callable[..., Server], tokenizer: Tokenizer) -> None:
    """ChatOpenAI binds a tool, runs the call that comes back, and sends its result in a second turn."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    @tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    turns = [
        [*tokenizer.encode(t, add_special_tokens=False), 1000]
        for t in ('[get_weather(city="Rome")]', "It is sunny.")
    ]
    server = make_server(lambda request: turns[min(len(server.engine.submitted) - 1, 1)])
    model = ChatOpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0
    ).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("Weather in Rome?")]
    answer = model.invoke(messages)
    messages.append(answer)
    assert [call["args"] for call in answer.tool_calls] == [{"city": "Rome"}]
    for call in answer.tool_calls:
        messages.append(ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]))
    assert model.invoke(messages).content == "It is sunny."


def test_langchain_streams_calls(make_server: Callable[..., Server]) -> None:
    """ChatOpenAI merges the chunks of two parallel calls by index."""
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    server = make_server('Looking. [get_weather(city="Rome", days=1), now()]')
    model = ChatOpenAI(  # type: ignore[call-arg]
        model="tiny", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0, max_tokens=300
    ).bind_tools([WEATHER, TIME])
    whole: Any = None
    for chunk in model.stream("Weather?"):
        whole = chunk if whole is None else whole + chunk
    assert whole.content == "Looking."
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == [
        ("get_weather", {"city": "Rome", "days": 1}),
        ("now", {}),
    ]


def test_held_back_tokens_keep_their_logprobs(
    make_server: Callable[..., Server], tokenizer: Tokenizer
) -> None:
    """A call is held back as text, but every token's log probability is streamed once."""
    text = 'Ok [get_weather(city="Rome")]'
    server = make_server(text)
    tokens = [
        entry.token
        for chunk in ask(server, stream=True, logprobs=True, max_tokens=300)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert "".join(tokens) == text
