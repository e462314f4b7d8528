"""Tools of a chat request: checks their definitions, turns ``tool_choice`` into a constraint, reads the calls back.

``required`` and a named tool constrain the model to a JSON list of calls; ``auto`` lets it write what it likes and
finds the calls in it. Called by the chat and responses handlers; the text itself is read by ``text/``.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from outrider.errors import RequestError
from outrider.server.protocol import ChatMessage
from outrider.text.forced_calls import NAME_CLOSING, NAME_OPENING, ForcedCallReader
from outrider.text.tool_calls import Part, ToolCall, ToolCallParser
from outrider.types import FINISH_STOP, GrammarSpec, SamplingParams

MAX_TOOLS = 128
MAX_FORCED_CALLS = 16
FINISH_TOOL_CALLS = "tool_calls"
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_SCHEMA_OPTIONS = {
    # Keywords that cannot be enforced are left to the tool; the two others are those of response_format.
    "lenient": True,
    "coerce_one_of": True,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,48}",
}


@dataclass(frozen=True)
class ToolUse:
    """What the model may call. ``forced``: it must; ``named``: it must call the one tool that the client chose."""

    names: tuple[str, ...]
    forced: bool = False
    named: bool = False
    parallel: bool = True
    grammar: GrammarSpec | None = None


def tool_use(tools: list[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """The validated tools of a request; None when none may be called. ``RequestError`` names what is wrong."""
    if tools is None:
        if choice not in (None, "none"):
            raise RequestError("tool_choice needs tools; send tools or remove it.", param="tool_choice")
        return None
    schemas = _schemas(tools)
    many = parallel is not False
    if isinstance(choice, dict):
        name = _chosen(choice)
        if name not in schemas:
            raise RequestError(
                f"tool_choice names '{name}', which is not among the tools.", param="tool_choice"
            )
        only = {name: schemas[name]}
        return ToolUse((name,), True, True, False, _calls_grammar(only, False))
    if choice in (None, "auto"):
        return ToolUse(tuple(schemas), parallel=many)
    if choice == "required":
        return ToolUse(tuple(schemas), True, False, many, _calls_grammar(schemas, many))
    if choice == "none":
        return None
    raise RequestError(
        "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}.",
        param="tool_choice",
    )


def _schemas(tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parameter schema of each tool by name."""
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise RequestError(f"tools must hold 1 to {MAX_TOOLS} tools, got {len(tools)}.", param="tools")
    schemas: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise RequestError(f"tools[{i}] must be of type 'function' with a function.", param=f"tools[{i}]")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"tools[{i}].function.name must be 1 to 64 letters, digits, '_', '.' or '-'.",
                param=f"tools[{i}].function.name",
            )
        if name in schemas:
            raise RequestError(f"tools[{i}] repeats the name '{name}'.", param=f"tools[{i}].function.name")
        parameters = function.get("parameters")
        if not isinstance(parameters, dict | None):
            raise RequestError(
                f"tools[{i}].function.parameters must be a JSON schema of an object.",
                param=f"tools[{i}].function.parameters",
            )
        schemas[name] = parameters or {}
    return schemas


def _chosen(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    if choice.get("type") != "function" or not isinstance(name, str):
        raise RequestError(
            "tool_choice must be {'type': 'function', 'function': {'name': ...}}.", param="tool_choice"
        )
    return name


def _calls_grammar(schemas: dict[str, dict[str, Any]], many: bool) -> GrammarSpec:
    """A list of calls in exactly the form that ``ForcedCallReader`` reads; each schema is a document of its own."""
    repeat = f' (", " call){{0,{MAX_FORCED_CALLS - 1}}}' if many else ""
    rules = [f'start: "[" call{repeat} "]"', "call: " + " | ".join(f"c{i}" for i in range(len(schemas)))]
    for i, (name, schema) in enumerate(schemas.items()):
        head = f"{NAME_OPENING}{_json(name)}{NAME_CLOSING}"
        rules.append(f'c{i}: {_json(head)} a{i} "}}"')
        rules.append(f"a{i}: %json {_json(_closed(schema))}")
    return GrammarSpec("grammar", "\n".join(rules))


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An object schema that allows no argument that the tool does not name, unless it says so."""
    closed = {"additionalProperties": False} if "properties" in schema or not schema else {}
    return {"properties": {}, **closed, **schema, "type": "object", "x-guidance": _SCHEMA_OPTIONS}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def constrained(params: SamplingParams, use: ToolUse | None) -> SamplingParams:
    """``params`` with the constraint of forced tools; it leaves no room for another one."""
    if use is None or use.grammar is None:
        return params
    if params.grammar is not None:
        raise RequestError(
            "tool_choice already constrains the answer; remove response_format or use tool_choice 'auto'.",
            param="tool_choice",
        )
    return msgspec.structs.replace(params, grammar=use.grammar)


class ToolCallOutput:
    """Turns the text of one choice into message deltas; implements ``chat.OutputParser``."""

    is_plain = False

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._parser = ToolCallParser(use.names)
        self._forced = ForcedCallReader()
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """The ``delta`` objects that new text completes."""
        if self._use.forced:
            return [
                self._begin(value) if kind == "name" else self._extend(value)
                for kind, value in self._forced.push(text)
            ]
        return self._deltas(self._parser.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """The ``delta`` objects held back until the end."""
        return [] if self._use.forced else self._deltas(self._parser.finish())

    def message(self, message: ChatMessage, finish_reason: str | None) -> str | None:
        """Fill in the whole message after ``finish``; calls make the finish reason ``tool_calls``."""
        content = "".join(self._content)
        message.content = content if content or self._use.forced or not self._calls else None
        if self._calls:
            message.tool_calls = self.calls()
            if finish_reason == FINISH_STOP and not self._use.named:
                return FINISH_TOOL_CALLS
        return finish_reason

    def calls(self) -> list[dict[str, Any]]:
        """The calls so far, as a message holds them."""
        return [
            {**call, "function": {**call["function"], "arguments": "".join(pieces)}}
            for call, pieces in zip(self._calls, self._arguments, strict=True)
        ]

    def _deltas(self, parts: list[Part]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, ToolCall):
                if self._use.parallel or not self._calls:
                    deltas += [self._begin(part.name), self._extend(part.arguments)]
            else:
                self._content.append(part)
                deltas.append({"content": part})
        return deltas

    def _begin(self, name: str) -> dict[str, Any]:
        """A call's first delta carries all that strict clients ask of it: index, id, type and name."""
        call = {
            "id": f"chatcmpl-tool-{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        self._calls.append(call)
        self._arguments.append([])
        return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}

    def _extend(self, arguments: str) -> dict[str, Any]:
        self._arguments[-1].append(arguments)
        return {"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": arguments}}]}
