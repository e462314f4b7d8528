"""Finds tool calls in what a model writes, token by token; called by ``server/tools.py``.

Llama 4 writes calls as a Python list, ``[f(a=1, b="x"), g()]``, or as JSON objects with ``name`` and ``parameters``
(or ``arguments``), alone, in a list, or separated by semicolons and line ends; often after some prose, sometimes
between ``<|python_start|>`` and ``<|python_end|>``. All of that is read, in any mixture. Text that is no well-formed
call of an offered tool is content. What comes out does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from outrider.text.literals import Cursor, NotACallError, Work, expect, name, skip_spaces, string, value

MAX_NAME_CHARS = 128
MARKERS = ("<|python_start|>", "<|python_end|>", "<|python_tag|>", "<|eom|>", "<|eot|>")

_KEYS = frozenset({"type", "id", "name", "parameters", "arguments", "function"})
_MARKER_PREFIXES = frozenset(marker[:i] for marker in MARKERS for i in range(1, len(marker) + 1))


class ToolCall(msgspec.Struct, frozen=True):
    """A complete call: a tool's name and its arguments as a JSON object in text."""

    name: str
    arguments: str


Part = str | ToolCall


class ToolCallParser:
    """Splits text into content and calls. A call is held back until it is complete, everything else is not."""

    def __init__(self, names: Collection[str]) -> None:
        """``names`` are the tools that may be called."""
        self._names = frozenset(names)
        self._prefixes = frozenset(n[:i] for n in names for i in range(1, len(n) + 1))
        self._cursor = Cursor()
        self._candidate: Work | None = None
        self._held: list[str] = []
        self._start = _start_pattern(names)
        self._spaces: list[str] = []
        self._parts: list[Part] = []
        self._num_calls = 0
        self._after_call = False

    def push(self, text: str) -> list[Part]:
        """The content and the calls that ``text`` completes, in order."""
        at = 0
        while at < len(text):
            at = self._scan(text, at) if self._candidate is None else self._continue(text, at)
        return self._take()

    def finish(self) -> list[Part]:
        """What was held back when the text ends: an unfinished call is content."""
        if self._candidate is not None:
            self._reject(len(self._held))
        if not self._num_calls and self._spaces:
            self._parts.append("".join(self._spaces))
        self._spaces = []
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _scan(self, text: str, at: int) -> int:
        """Content up to the next place where a call or a marker may begin."""
        match = self._start.search(text, at)
        end = match.start() if match else len(text)
        self._content(text[at:end])
        if match:
            starters: dict[str, Callable[[], Work]] = {"[": self._list, "{": self._object, "<": self._marker}
            self._candidate = starters[match[0]]()
            self._held = []
            self._cursor.char = match[0]
            self._held.append(match[0])
            next(self._candidate)
            end += 1
        return end

    def _continue(self, text: str, at: int) -> int:
        """Feed the candidate until it ends, fails or the text is used up; returns where to go on."""
        assert self._candidate is not None
        cursor, held, resume = self._cursor, self._held, self._candidate.__next__
        for i in range(at, len(text)):
            cursor.char = text[i]
            held.append(cursor.char)
            try:
                resume()
            except StopIteration:
                self._candidate = None
                return i + 1
            except NotACallError:
                self._reject(len(held) - 1)
                return i
        return len(text)

    def _reject(self, count: int) -> None:
        """The first ``count`` held characters are content; the scan goes on behind them, so time stays linear."""
        self._candidate = None
        self._content("".join(self._held[:count]))

    def _content(self, text: str) -> None:
        """Content, but white space (and a separator behind a call) waits for what it separates."""
        body = text.rstrip(" \t\r\n;,") if self._after_call else text.rstrip()
        if body:
            self._parts.append("".join([*self._spaces, body]))
            self._spaces = []
            self._after_call = False
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def _add(self, call: ToolCall) -> None:
        self._parts.append(call)
        self._num_calls += 1
        self._after_call = True
        self._spaces = []
        self._held.clear()

    # -- candidates: generators over the characters behind their first one --------------------------------

    def _marker(self) -> Work:
        """A control token that reached the text is dropped."""
        text = self._cursor.char
        while text not in MARKERS:
            yield
            text += self._cursor.char
            if text not in _MARKER_PREFIXES:
                raise NotACallError

    def _list(self) -> Work:
        """Python calls or JSON objects between brackets."""
        at = self._cursor
        yield
        yield from skip_spaces(at)
        one = self._object if at.char == "{" else self._python_call
        while True:
            yield from one()
            yield
            yield from skip_spaces(at)
            if at.char == "]":
                return
            yield from expect(at, ",")
            yield from skip_spaces(at)

    def _python_call(self) -> Work:
        """``f(a=1)``; ends on the closing parenthesis."""
        at = self._cursor
        tool = ""
        while at.char != "(":
            tool += at.char
            if tool not in self._prefixes:
                raise NotACallError
            yield
        if tool not in self._names:
            raise NotACallError
        yield
        yield from skip_spaces(at)
        arguments: dict[str, Any] = {}
        while at.char != ")":
            key = yield from name(at, MAX_NAME_CHARS)
            yield from skip_spaces(at)
            yield from expect(at, "=")
            yield from skip_spaces(at)
            if not key:
                raise NotACallError
            arguments[key] = yield from value(at)
            yield from skip_spaces(at)
            if at.char != ")":
                yield from expect(at, ",")
                yield from skip_spaces(at)
        self._add(ToolCall(tool, _to_json(arguments)))

    def _object(self) -> Work:
        """``{"name": ..., "parameters": ...}`` with its keys in any order; ends on the closing brace."""
        at = self._cursor
        yield
        yield from skip_spaces(at)
        items: dict[str, Any] = {}
        while True:
            key = yield from string(at)
            if key not in _KEYS:
                raise NotACallError
            yield from skip_spaces(at)
            yield from expect(at, ":")
            yield from skip_spaces(at)
            items[key] = yield from value(at)
            if key == "name" and items[key] not in self._names:
                raise NotACallError
            yield from skip_spaces(at)
            if at.char == "}":
                break
            yield from expect(at, ",")
            yield from skip_spaces(at)
        inner = items.get("function")
        self._add(self._call_of(inner if isinstance(inner, dict) else items))

    def _call_of(self, items: dict[str, Any]) -> ToolCall:
        tool = items.get("name")
        arguments = items.get("parameters", items.get("arguments", NotACallError))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise NotACallError from error
        if tool not in self._names or not isinstance(arguments, dict | None):
            raise NotACallError
        return ToolCall(tool, _to_json(arguments or {}))


def _start_pattern(names: Collection[str]) -> re.Pattern[str]:
    """Where a call or a marker may begin, as far as the piece of text at hand can tell."""
    letters = "".join(sorted({re.escape(n[0]) for n in names}))
    return re.compile(rf"""\[(?=\s*(?:[{{{letters}]|\Z))|\{{(?=\s*(?:["']|\Z))|<(?=\||\Z)""")


def _to_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
