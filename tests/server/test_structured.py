"""Structured output end to end on the embedded model: a real server process, real masks, real clients.

A 135 M model follows no schema by itself: what comes out valid is the constraint's work. Oracles: ``json``, ``re``,
``pydantic`` and the clients' own parsers.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.e2e.server_process import ServerProcess


class Person(BaseModel):
    """A schema that the model would never hit by chance; enums keep it short."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Ann", "Bob"]
    age: Literal[1, 22, 333]
    tags: Annotated[list[Literal["x", "y"]], Field(max_length=2)]


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ASK: Any = [{"role": "user", "content": "Tell me about the weather in Rome."}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["--max-model-len", "1024", "--max-num-seqs", "32"]) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize(
    ("body", "check"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-[a-f]{2}"}}, lambda t: re.fullmatch(r"\d{3}-[a-f]{2}", t)),
        ({"guided_regex": "(red|green) wine"}, lambda t: t in ("red wine", "green wine")),
        ({"structured_outputs": {"choice": ["maybe", "surely not"]}}, lambda t: t in ("maybe", "surely not")),
        ({"guided_choice": ["left", "right"]}, lambda t: t in ("left", "right")),
        ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c") "d"'}}, lambda t: t in ("abd", "acd")),
        ({"guided_grammar": 'start: "x" | "yy"'}, lambda t: t in ("x", "yy")),
        (
            {"structured_outputs": {"json": Person.model_json_schema()}},
            lambda t: Person.model_validate_json(t),
        ),
        ({"guided_json": json.dumps(Person.model_json_schema())}, lambda t: Person.model_validate_json(t)),
        (
            {
                "structured_outputs": {
                    "json": {"type": "object", "properties": {"a": {"const": [1, 2]}}, "required": ["a"]},
                    "disable_any_whitespace": True,
                    "disable_additional_properties": True,
                }
            },
            lambda t: t == '{"a":[1,2]}',
        ),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_notation_constrains_completions(
    server: ServerProcess, body: dict[str, Any], check: Any, temperature: float
) -> None:
    """Each spelling of each kind holds, greedy and sampled, and the text ends by itself."""
    answer = server.http.post(
        "/v1/completions", json={"prompt": "Hello", "max_tokens": 300, "temperature": temperature, **body}
    ).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    assert check(choice["text"]), choice["text"]


def test_parse_gives_pydantic_objects(client: openai.OpenAI) -> None:
    """chat.completions.parse and responses.parse, as applications call them."""
    parsed = client.chat.completions.parse(
        model="", messages=ASK, response_format=Person, max_tokens=300, temperature=1.0, seed=3
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    response = client.responses.parse(model="", input="Hi", text_format=Person, max_output_tokens=300)
    assert isinstance(response.output_parsed, Person)


def test_json_object_begins_an_object(client: openai.OpenAI) -> None:
    """The loosest constraint: whatever the model writes is the beginning of one JSON object."""
    choice = client.chat.completions.create(
        model="", messages=ASK, response_format={"type": "json_object"}, max_tokens=120, temperature=0
    ).choices[0]
    text = choice.message.content or ""
    assert text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_tools_make_valid_calls(client: openai.OpenAI, choice: Any) -> None:
    """Whole and streamed; arguments arrive in several pieces and parse against the tool's schema."""
    body: Any = {"model": "", "messages": ASK, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 300}
    message = (
        client.chat.completions.create(**body, parallel_tool_calls=False, temperature=0).choices[0].message
    )
    assert message.tool_calls
    pieces: list[str] = []
    for chunk in client.chat.completions.create(
        **body, parallel_tool_calls=False, temperature=0, stream=True
    ):
        for delta in chunk.choices[0].delta.tool_calls or []:
            pieces.append(delta.function.arguments or "")
    assert len(pieces) > 3, "forced arguments are streamed, not held back"
    for text in (message.tool_calls[0].function.arguments, "".join(pieces)):
        assert set(json.loads(text)) == {"city", "days"}


def test_langchain_tool_loop_on_a_real_model(server: ServerProcess) -> None:
    """ChatOpenAI with tool_choice any: the call runs, its result goes back, text comes out."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    @tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    model = ChatOpenAI(
        model="embedded", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0, max_tokens=60
    )  # type: ignore[call-arg]
    model.model_name = server.http.get("/v1/models").json()["data"][0]["id"]
    messages: list[Any] = [HumanMessage("Weather in Rome?")]
    answer = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(messages)
    [call] = answer.tool_calls
    messages += [answer, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert isinstance(model.invoke(messages).content, str)


BAD: list[dict[str, Any]] = [
    {"structured_outputs": {}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    {"structured_outputs": {"regex": "a"}, "guided_json": {}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "yaml"}},
    {"response_format": {"type": "json_object"}, "guided_regex": "a"},
    {"guided_choice": []},
    {"structured_outputs": {"choice": [1]}},
    {"guided_regex": "("},
    {"guided_json": {"type": "banana"}},
    {"guided_json": "{"},
    {"guided_grammar": "start: nothing"},
    {"guided_regex": "x" * 100_000},
    {"guided_regex": "a", "allowed_token_ids": [1]},
]


@pytest.mark.parametrize("body", BAD)
def test_bad_constraints_are_refused(server: ServerProcess, body: dict[str, Any]) -> None:
    """400 with one sentence, whether the server or the engine finds out; a stream says so in an event."""
    answer = server.http.post("/v1/completions", json={"prompt": "x", **body})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message.endswith(".") and "\n" not in message and "Error" not in message


def _random_schema(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["integer", "string", "boolean", "null", "number", "enum", "pattern", "broken"]
    kind = rng.choice(kinds + (["object", "array", "anyOf", "$ref"] * 2 if depth < 4 else []))
    if kind == "object":
        names = rng.sample(["a", "b", 'c"', "日本", "", "x" * 50], rng.randrange(4))
        return {
            "type": "object",
            "properties": {name: _random_schema(rng, depth + 1) for name in names},
            "required": names[: rng.randrange(len(names) + 1)],
            "additionalProperties": rng.choice([True, False]),
        }
    if kind == "array":
        return {
            "type": "array",
            "items": _random_schema(rng, depth + 1),
            "minItems": rng.choice([0, 1, 10**6, -1]),
            "maxItems": rng.choice([1, 3, 10**9]),
        }
    if kind == "anyOf":
        return {"anyOf": [_random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    return {
        "$ref": {"$ref": rng.choice(["#", "#/$defs/none", "http://127.0.0.1:9/x", "file:///etc/passwd"])},
        "enum": {"enum": [rng.choice([1, "a", None, 1.5, [1], {"k": "v"}]) for _ in range(rng.randrange(4))]},
        "pattern": {
            "type": "string",
            "pattern": rng.choice(["^[a-z]{2,5}$", "(", "(a+)+$", "\\p{L}{1,9999}"]),
        },
        "broken": rng.choice(
            [{"type": 7}, {"type": "object", "properties": []}, {"minimum": "x"}, {"not": {}}]
        ),
    }.get(kind, {"type": kind})


def _random_regex(rng: random.Random) -> str:
    atoms = [
        "a",
        ".",
        "[a-z]",
        "(x|y)",
        r"\d",
        "(",
        ")",
        "[",
        "{3}",
        "{1,5000}",
        "+",
        "*",
        "?",
        "|",
        r"\1",
        "(?=a)",
        "é",
    ]
    return "".join(rng.choice(atoms) for _ in range(rng.randrange(1, 30))) * rng.choice([1, 1, 1, 50])


HOSTILE_GRAMMARS = [
    "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4000)) + '\na4000: "x"',
    "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"',
    'start: x{1000}\nx: y{1000}\ny: "a"{1000}',
    "start: " + "(" * 20_000,
    'start: a a a a\na: b | b b |\nb: start | "x"',
]


def _fuzzed(rng: random.Random) -> dict[str, Any]:
    kind = rng.randrange(10)
    if kind < 4:
        return {"guided_json": _random_schema(rng) if rng.random() < 0.9 else "[" * 3000}
    if kind < 7:
        return {"guided_regex": _random_regex(rng)}
    if kind < 8:
        return {"guided_grammar": rng.choice(HOSTILE_GRAMMARS)}
    tools = [
        {
            "type": "function",
            "function": {
                "name": rng.choice(["f", "g", "a b", ""]) + str(i),
                "parameters": _random_schema(rng),
            },
        }
        for i in range(rng.choice([1, 2, 128, 129]))
    ]
    return {"messages": ASK, "tools": tools, "tool_choice": rng.choice(["required", "auto", "none", "all"])}


def test_300_fuzzed_constraints_leave_the_server_serving(server: ServerProcess) -> None:
    """Valid, broken and hostile: each is answered or refused in time, and greedy control texts do not change."""
    rng = random.Random(20261123)
    control = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}

    def post(body: dict[str, Any]) -> tuple[int, Any, float]:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        started = time.monotonic()
        answer = server.http.post(path, json={"prompt": "x", "max_tokens": 6, "seed": 1, **body})
        return answer.status_code, answer.json(), time.monotonic() - started

    expected = post(control)[1]["choices"][0]["text"]
    bodies: list[dict[str, Any]] = []
    for i in range(300):
        bodies.append(_fuzzed(rng))
        if i % 10 == 0:
            bodies.append(control)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(post, bodies))
    counts: dict[int, int] = {}
    for body, (status, answer, seconds) in zip(bodies, answers, strict=True):
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400), (body, answer)
        assert seconds < 60, (seconds, body)
        if body is control:
            assert answer["choices"][0]["text"] == expected
        elif status == 400:
            assert answer["error"]["message"]
    assert counts[200] > 60 and counts[400] > 60, counts
    assert server.http.get("/health").status_code == 200
    assert not any("starting it again" in line for line in server.log)
