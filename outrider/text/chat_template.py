"""A checkpoint's chat template: messages in, plain text and control token ids out; called by the server.

The template is the checkpoint's own Jinja source, run in jinja2's immutable sandbox with the helpers that
``transformers`` gives it. Control tokens are trusted by *origin*: those spelled in the template's own literals (or
passed as ``bos_token`` and the like) are replaced by sentinels before the template is compiled, and only
sentinels become token ids. Whatever a user writes, in any field, joined or trimmed in any way, stays text.

Sentinels are lone surrogates, which no valid JSON or UTF-8 text can contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import ConfigError, RequestError
from outrider.text.tokenizer import special_pattern

_FIRST_SENTINEL, _MAX_SENTINELS = 0xD800, 0x7FF
_SENTINEL = re.compile("([\ud800-\udffe])")
_END_OF_PREFILL = "\udfff"
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


class ChatTemplate:
    """A compiled chat template. Immutable, hence safe to share between threads."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, int], named_tokens: Mapping[str, str]
    ) -> None:
        """Compile ``source``; ``special_tokens`` maps spellings to ids, ``named_tokens`` names to spellings."""
        self.source = source
        self._ids: list[int] = []
        self._sentinels: dict[str, str] = {}
        self._special_tokens = special_tokens
        self._pattern = re.compile(special_pattern(special_tokens)) if special_tokens else None
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.iterates_content = _iterates_content(tree)
            self._mark_literals(tree)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template has an error in line {error.lineno}: {error.message}"
            ) from error
        self._named_tokens = {name: self._mark(text) for name, text in named_tokens.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[str | int]:
        """The prompt as plain text pieces and control token ids, in order.

        With ``continue_final_message`` the prompt ends inside the last message, for the model to go on with.
        ``variables`` are the request's ``chat_template_kwargs``. Raises ``RequestError`` when the template refuses
        the messages or cannot render them.
        """
        variables = variables or {}
        if taken := (_RESERVED | self._named_tokens.keys()) & variables.keys():
            raise RequestError(
                f"chat_template_kwargs cannot set '{min(taken)}'; remove it.", param="chat_template_kwargs"
            )
        if continue_final_message:
            last = messages[-1]
            if not isinstance(last.get("content"), str):
                raise RequestError("continue_final_message needs a last message of text.", param="messages")
            messages = [*messages[:-1], {**last, "content": last["content"] + _END_OF_PREFILL}]
        try:
            text = self._template.render(
                {
                    **self._named_tokens,
                    **variables,
                    "messages": messages,
                    "tools": tools,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _Refused as error:
            raise RequestError(
                f"The chat template refuses the messages: {error.message}", param="messages"
            ) from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(
                "The chat template cannot render these messages; check roles and content.", param="messages"
            ) from error
        if continue_final_message:
            text, mark, _ = text.rpartition(_END_OF_PREFILL)
            if not mark:
                raise RequestError("The chat template drops the last message.", param="messages")
        parts = _SENTINEL.split(text)
        return [
            self._ids[ord(part) - _FIRST_SENTINEL] if i % 2 else part for i, part in enumerate(parts) if part
        ]

    def _mark_literals(self, tree: nodes.Template) -> None:
        for data in tree.find_all(nodes.TemplateData):
            data.data = self._mark(data.data)
        for const in tree.find_all(nodes.Const):
            if isinstance(const.value, str):
                const.value = self._mark(const.value)

    def _mark(self, literal: str) -> str:
        return (
            self._pattern.sub(lambda match: self._sentinel(match[0]), literal) if self._pattern else literal
        )

    def _sentinel(self, token: str) -> str:
        if token not in self._sentinels:
            if len(self._ids) == _MAX_SENTINELS:
                raise ConfigError(
                    f"the chat template names more than {_MAX_SENTINELS} control tokens; shorten it"
                )
            self._sentinels[token] = chr(_FIRST_SENTINEL + len(self._ids))
            self._ids.append(self._special_tokens[token])
        return self._sentinels[token]


class _Refused(TemplateError):
    """The template called ``raise_exception``."""


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training; when serving it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter would escape ``<`` and ``'`` for HTML."""
    separators, sort_keys = options.get("separators"), options.get("sort_keys", False)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, i.e. understands lists of parts."""
    names = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node, set())
    }
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
