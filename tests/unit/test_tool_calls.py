"""Tool calls in model text: every form Llama 4 writes, the same result however the text is cut, linear time."""

from __future__ import annotations

import json
import random
import time

import pytest

from outrider.text.tool_calls import ToolCall, ToolCallParser

NAMES = ["get_weather", "f", "g", "a.b-c"]


def parse(text: str, seed: int | None = None) -> list[str | tuple[str, object]]:
    """Content (joined) and calls (arguments decoded by ``json``); ``seed`` cuts the text into small pieces."""
    parser, parts = ToolCallParser(NAMES), []
    rng = random.Random(seed)
    at = 0
    while at < len(text):
        size = len(text) if seed is None else rng.randrange(1, 6)
        parts += parser.push(text[at : at + size])
        at += size
    parts += parser.finish()
    merged: list[str | tuple[str, object]] = []
    for part in parts:
        if isinstance(part, ToolCall):
            merged.append((part.name, json.loads(part.arguments)))
        elif merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


CASES: dict[str, list[str | tuple[str, object]]] = {
    '[get_weather(city="Paris", days=3)]': [("get_weather", {"city": "Paris", "days": 3})],
    '[f(), g(a=[1,2,{"x": None}], b=(True, -.5))]': [
        ("f", {}),
        ("g", {"a": [1, 2, {"x": None}], "b": [True, -0.5]}),
    ],
    "Sure!\n\n[f(a=true)]<|python_end|>": ["Sure!", ("f", {"a": True})],
    "<|python_start|>[f(a=1.5)]<|python_end|><|eom|>": [("f", {"a": 1.5})],
    '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}': [("f", {"a": 1}), ("g", {})],
    '{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "arguments": "{\\"b\\": 2}"}': [
        ("f", {"a": 1}),
        ("g", {"b": 2}),
    ],
    '[{"name": "f", "parameters": {}}, {"arguments": {"a": "\\u00e9\\ud83d\\ude00"}, "name": "g"}]': [
        ("f", {}),
        ("g", {"a": "é😀"}),
    ],
    '{"type": "function", "function": {"name": "f", "arguments": {}}}': [("f", {})],
    '{"type": "function", "name": "f", "parameters": null}': [("f", {})],
    '{"name": "Bob", "age": 3}': ['{"name": "Bob", "age": 3}'],
    '{"answer": [1, 2]}': ['{"answer": [1, 2]}'],
    "[1, 2, 3] and [unknown(a=1)]": ["[1, 2, 3] and [unknown(a=1)]"],
    "[f(a=Paris)]": ["[f(a=Paris)]"],
    "[f(1)]": ["[f(1)]"],
    "[f(a=1e999)]": ["[f(a=1e999)]"],
    "see [f](http://x) or [f(a='it\\'s \\x41\\n')]": ["see [f](http://x) or", ("f", {"a": "it's A\n"})],
    '[a.b-c(x="""many "quoted"\nlines""", y="")]': [("a.b-c", {"x": 'many "quoted"\nlines', "y": ""})],
    "x[[f()]]": ["x[", ("f", {}), "]"],
    "  white space stays  ": ["  white space stays  "],
    "cut off: [f(a=1": ["cut off: [f(a=1"],
    "a < b <|py <|python_start|>!": ["a < b <|py !"],
    "[f(a=1), oops]": [("f", {"a": 1}), ", oops]"],
    '[f(a="\\ud800")]': [("f", {"a": "�"})],
}


@pytest.mark.parametrize("text", CASES)
def test_each_form_is_read_whole_and_in_pieces(text: str) -> None:
    """Guards against calls left in the content, and against results that depend on streaming (USERS 6 and 22)."""
    assert parse(text) == CASES[text]
    for seed in range(25):
        assert parse(text, seed) == CASES[text]


@pytest.mark.parametrize("seed", range(300))
def test_random_calls_come_back(seed: int) -> None:
    """Fresh nested arguments, written by ``repr`` and ``json``, with prose around: nothing lost, nothing invented."""
    rng = random.Random(seed)

    def literal(depth: int) -> object:
        kind = rng.randrange(8 if depth < 3 else 5)
        if kind < 5:
            text = "".join(rng.choice("ab\"'\\\n[]{}(),:=<|é😀") for _ in range(rng.randrange(8)))
            return [rng.randrange(-99, 99), text, rng.random(), None, rng.random() < 0.5][kind]
        if kind < 7:
            return [literal(depth + 1) for _ in range(rng.randrange(3))]
        return {str(i): literal(depth + 1) for i in range(rng.randrange(3))}

    calls = [
        (rng.choice(NAMES), {f"p{i}": literal(0) for i in range(rng.randrange(4))})
        for _ in range(rng.randrange(1, 4))
    ]
    if rng.random() < 0.5:
        inner = ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls)
        text = f"[{inner}]"
    else:
        key = rng.choice(["parameters", "arguments"])
        text = "; ".join(json.dumps({"name": n, key: a}, ensure_ascii=rng.random() < 0.5) for n, a in calls)
    prose = rng.choice(["", "Let me see. ", "1 < 2 [sic] {ok}\n"])
    want = ([prose.rstrip()] if prose else []) + calls
    assert parse(prose + text) == want
    assert parse(prose + text, seed) == want


@pytest.mark.parametrize("seed", range(300))
def test_garbage_is_kept_and_cut_independent(seed: int) -> None:
    """Broken calls: content in and content out agree, whatever the cut; nothing raises."""
    rng = random.Random(seed)
    pieces = [
        "[",
        "]",
        "{",
        "}",
        "(",
        ")",
        "f",
        "g(",
        "a=",
        "1",
        '"',
        "'",
        ",",
        ":",
        '{"name": "f"',
        "<|",
        "\\",
        " ",
    ]
    text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 60)))
    whole = parse(text)
    assert parse(text, seed) == parse(text, seed + 1) == whole
    if all(isinstance(part, str) for part in whole):
        assert "".join(map(str, whole)) == text


def seconds(unit: str, size: int) -> float:
    """Processor time for ``size`` characters of ``unit``, pushed as a stream would."""
    text = unit * (size // len(unit))
    started = time.process_time()
    parser = ToolCallParser(NAMES)
    for at in range(0, len(text), 64):
        parser.push(text[at : at + 64])
    parser.finish()
    return time.process_time() - started


@pytest.mark.parametrize(
    "unit",
    [
        "[",
        "{",
        "[f(a=",
        '{"name":',
        "[f(a=[",
        " ",
        "[ ",
        "<|python_star",
        "[f(a=1)]",
        "[f(a='\\",
        "[f]",
        "f(",
    ],
)
def test_garbage_takes_linear_time(unit: str) -> None:
    """No rescanning: four times the garbage takes about four times the time (S14)."""
    assert seconds(unit, 1 << 18) < 12 * seconds(unit, 1 << 16) + 0.1


def test_a_megabyte_takes_seconds() -> None:
    """The dearest garbage: every fifth character begins a call of a real tool that fails."""
    assert seconds("[f(a=", 1 << 20) < 20
