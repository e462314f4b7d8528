"""Reads JSON and Python literals one character at a time, for ``text/tool_calls.py``.

A parser is a generator that is resumed once per character; it raises ``NotACallError`` at the first character that
cannot belong. Time is linear, nesting is bounded, nothing is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 64
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_WORDS: dict[str, Any] = {
    "True": True,
    "true": True,
    "False": False,
    "false": False,
    "None": None,
    "null": None,
}
_CLOSING = {"[": "]", "(": ")", "{": "}"}

Steps = Generator[None, None, Any]
Work = Generator[None, None, None]


class NotACallError(Exception):
    """The text cannot be a tool call; it is content."""


class Cursor:
    """The character at which a parser stands; the driver writes it before each resumption."""

    __slots__ = ("char",)

    def __init__(self) -> None:
        self.char = ""


def skip_spaces(at: Cursor) -> Work:
    """Move to the next character that is no white space."""
    while at.char.isspace():
        yield


def expect(at: Cursor, char: str) -> Work:
    """Move past ``char``."""
    if at.char != char:
        raise NotACallError
    yield


def value(at: Cursor, depth: int = 0) -> Steps:
    """A literal; afterwards the cursor stands on the character behind it."""
    char = at.char
    if depth > MAX_DEPTH:
        raise NotACallError
    if char in "\"'":
        return (yield from string(at))
    if char == "{":
        return (yield from _mapping(at, depth))
    if char in "[(":
        return (yield from _sequence(at, depth))
    if char.isdigit() or char in "+-.":
        return (yield from _number(at))
    if char.isalpha():
        word = yield from name(at, max(map(len, _WORDS)))
        if word in _WORDS:
            return _WORDS[word]
    raise NotACallError


def name(at: Cursor, max_chars: int) -> Steps:
    """Letters, digits and underscores."""
    chars = []
    while at.char.isalnum() or at.char == "_":
        chars.append(at.char)
        if len(chars) > max_chars:
            raise NotACallError
        yield
    return "".join(chars)


def string(at: Cursor) -> Steps:
    """A string in single, double or triple quotes; lone surrogates become U+FFFD."""
    if at.char not in "\"'":
        raise NotACallError
    quote = at.char
    yield
    is_triple = False
    if at.char == quote:
        yield
        if at.char != quote:
            return ""
        is_triple = True
        yield
    chars: list[str] = []
    num_quotes = 0
    while True:
        if at.char == quote:
            num_quotes += 1
            if not is_triple or num_quotes == 3:
                break
            yield
            continue
        chars.append(quote * num_quotes)
        num_quotes = 0
        if at.char == "\\":
            yield
            yield from _escape(at, chars)
        else:
            chars.append(at.char)
            yield
    yield
    return "".join(chars).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _escape(at: Cursor, chars: list[str]) -> Work:
    kind = at.char
    if kind in _HEX_ESCAPES:
        digits = ""
        for _ in range(_HEX_ESCAPES[kind]):
            yield
            digits += at.char
        try:
            chars.append(chr(int(digits, 16)))
        except (ValueError, OverflowError) as error:
            raise NotACallError from error
    else:  # as in Python, an unknown escape keeps its backslash
        chars.append(_ESCAPES.get(kind, kind if kind in "\\\"'/" else "\\" + kind))
    yield


def _number(at: Cursor) -> Steps:
    chars = ""
    while at.char.isalnum() or (at.char and at.char in "+-._"):
        chars += at.char
        if len(chars) > MAX_NUMBER_CHARS:
            raise NotACallError
        yield
    try:
        return int(chars)
    except ValueError:
        pass
    try:
        number = float(chars)
    except ValueError as error:
        raise NotACallError from error
    if not math.isfinite(number):
        raise NotACallError
    return number


def _sequence(at: Cursor, depth: int) -> Steps:
    closing = _CLOSING[at.char]
    yield
    items = []
    yield from skip_spaces(at)
    while at.char != closing:
        items.append((yield from value(at, depth + 1)))
        yield from _separator(at, closing)
    yield
    return items


def _mapping(at: Cursor, depth: int) -> Steps:
    yield
    items = {}
    yield from skip_spaces(at)
    while at.char != "}":
        key = yield from string(at)
        yield from skip_spaces(at)
        yield from expect(at, ":")
        yield from skip_spaces(at)
        items[key] = yield from value(at, depth + 1)
        yield from _separator(at, "}")
    yield
    return items


def _separator(at: Cursor, closing: str) -> Work:
    """A comma, which may be left out before ``closing``."""
    yield from skip_spaces(at)
    if at.char != closing:
        yield from expect(at, ",")
        yield from skip_spaces(at)
