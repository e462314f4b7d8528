"""Reads tool calls that a grammar forced into one exact form, and passes their arguments on as they are written.

The form is ``[{"name": "f", "parameters": {...}}, ...]`` as ``server/tools.py`` spells it; since nothing else can
come, arguments stream without being held back. Free text is ``tool_calls``'s business.
"""

from __future__ import annotations

import json

NAME_OPENING, NAME_CLOSING = '{"name": ', ', "parameters": '


class ForcedCallReader:
    """``push`` gives the names that begin a call (``started``) and the argument text that follows, in order."""

    def __init__(self) -> None:
        self._head: list[str] = []
        self._depth = 0
        self._in_arguments = False
        self._in_string = False
        self._is_escaped = False

    def push(self, text: str) -> list[tuple[str, str]]:
        """``("name", tool)`` when a call begins, ``("arguments", piece)`` for each piece of its arguments."""
        events: list[tuple[str, str]] = []
        start = 0
        for i, char in enumerate(text):
            if not self._in_arguments:
                self._head.append(char)
                if char == " " and "".join(self._head[-len(NAME_CLOSING) :]) == NAME_CLOSING:
                    events.append(("name", self._name()))
                    self._head.clear()
                    self._in_arguments, start = True, i + 1
            elif self._closes(char):
                events.append(("arguments", text[start : i + 1]))
                self._in_arguments = False
        if self._in_arguments and start < len(text):
            events.append(("arguments", text[start:]))
        return events

    def _name(self) -> str:
        head = "".join(self._head)
        at = head.index(NAME_OPENING) + len(NAME_OPENING)
        return str(json.loads(head[at : -len(NAME_CLOSING)]))

    def _closes(self, char: str) -> bool:
        """Whether ``char`` ends the arguments' object."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            else:
                self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False
