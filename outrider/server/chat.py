"""POST /v1/chat/completions: messages through the checkpoint's template, text out as an assistant's message.

What the model writes passes through an ``OutputParser`` per choice, which splits it into message parts; the plain one
calls everything content. Keys and their order are the wire format.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from outrider.errors import RequestError
from outrider.server.call import Call
from outrider.server.chunks import ChunkWriter
from outrider.server.context import ServerContext
from outrider.server.generation import Delta, Generation
from outrider.server.logprobs import chat_logprobs, prompt_logprobs
from outrider.server.messages import render_chat
from outrider.server.protocol import ChatBody, ChatChoice, ChatLogprobs, ChatMessage, ChatResponse
from outrider.server.sampling import output_budget, sampling_params, truncate
from outrider.server.tools import ToolCallOutput, ToolUse, constrained, tool_use
from outrider.types import TokenLogprobs

_encode = msgspec.json.encode


class OutputParser(Protocol):
    """Splits the text of one choice into message deltas, piece by piece.

    ``is_plain``: every piece is a content delta as it is, so that a stream need not ask.
    """

    is_plain: bool

    def push(self, text: str) -> list[dict[str, Any]]:
        """The ``delta`` objects that new text completes."""
        ...

    def finish(self) -> list[dict[str, Any]]:
        """The ``delta`` objects held back until the end."""
        ...

    def message(self, message: ChatMessage, finish_reason: str | None) -> str | None:
        """Fill in the whole message after ``finish``; returns the finish reason, changed if need be."""
        ...


class PlainText:
    """All text is content."""

    is_plain = True

    def __init__(self) -> None:
        self._parts: list[str] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """One content delta, also for a text that is still empty (a token was generated)."""
        self._parts.append(text)
        return [{"content": text}]

    def finish(self) -> list[dict[str, Any]]:
        """Nothing is ever held back."""
        return []

    def message(self, message: ChatMessage, finish_reason: str | None) -> str | None:
        """The content is the text."""
        message.content = "".join(self._parts)
        return finish_reason


def output_parser(context: ServerContext, use: ToolUse | None) -> OutputParser:
    """The parser that the request's tools call for, for one choice."""
    if use is None:
        return PlainText()
    context.metrics.tool_parses.inc()
    return ToolCallOutput(use)


async def create_chat_completion(context: ServerContext, http: HttpRequest, body: ChatBody) -> Response:
    """Handle one call; raises ``RequestError`` before anything reaches the engine."""
    call = Call.begin(context, http, body, "chatcmpl-")
    _check(body)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if wanted == 0:
        raise RequestError("max_tokens must be at least 1, got 0.", param="max_tokens")
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if use is None and context.server_config.exclude_tools_when_tool_choice_none:
        body.tools = None
    prompt = await render_chat(context, body, documents=body.documents)
    if prompt.images and body.truncate_prompt_tokens is not None:
        raise RequestError(
            "truncate_prompt_tokens cannot be used with images.", param="truncate_prompt_tokens"
        )
    ids = truncate(context, body, prompt.ids, wanted or 1)
    prompt = replace(prompt, ids=ids)
    params = sampling_params(
        context,
        body,
        max_tokens=output_budget(context, wanted, len(prompt.ids)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    generation = call.generation(body, [prompt], [constrained(params, use)])
    parsers = [output_parser(context, use) for _ in generation.choices]
    return await call.answer(
        body,
        generation,
        whole=lambda: _whole(call, body, generation, parsers),
        frames=lambda: _frames(call, body, generation, parsers),
    )


def _check(body: ChatBody) -> None:
    if body.echo:
        raise RequestError("echo is not supported in chat; use continue_final_message.", param="echo")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if body.stream and body.prompt_logprobs:
        raise RequestError("prompt_logprobs is not available with stream.", param="prompt_logprobs")


def _logprobs(call: Call, body: ChatBody, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
    if not body.logprobs:
        return None
    context = call.context
    top = body.top_logprobs or 0
    as_token_ids = context.writes_token_ids(body.return_tokens_as_token_ids)
    num_top = context.vocab_size if top == -1 else top
    return chat_logprobs(context.tokenizer, entries or [], num_top, as_token_ids=as_token_ids)


async def _whole(
    call: Call, body: ChatBody, generation: Generation, parsers: list[OutputParser]
) -> ChatResponse:
    role = call.context.server_config.response_role
    choices = [ChatChoice(index=c.index, message=ChatMessage(role=role)) for c in generation.choices]
    response = ChatResponse(
        id=call.id, created=call.created, model=call.model, choices=choices, usage=call.usage(generation)
    )
    entries: list[list[TokenLogprobs]] = [[] for _ in choices]
    async for batch in generation.deltas():
        for choice, delta in batch:
            out, parser = choices[choice.index], parsers[choice.index]
            parser.push(delta.text)
            entries[choice.index] += delta.logprobs or []
            if delta.prompt_logprobs is not None and response.prompt_logprobs is None:
                response.prompt_logprobs = prompt_logprobs(call.context.tokenizer, delta.prompt_logprobs)
            if body.return_token_ids:
                out.token_ids = out.token_ids or []
                out.token_ids += delta.token_ids
            if delta.finish_reason is not None:
                parser.finish()
                out.finish_reason = parser.message(out.message, delta.finish_reason)
                out.stop_reason = delta.stop_reason
    for out, logprobs in zip(choices, entries, strict=True):
        out.logprobs = _logprobs(call, body, logprobs)
    if body.return_token_ids:
        response.prompt_token_ids = generation.prompts[0].ids
    response.usage = call.usage(generation)
    return response


async def _frames(
    call: Call, body: ChatBody, generation: Generation, parsers: list[OutputParser]
) -> AsyncGenerator[bytes, None]:
    chunks = ChunkWriter(id=call.id, object="chat.completion.chunk", created=call.created, model=call.model)
    role = _encode(call.context.server_config.response_role)
    opening = b'"delta":{"role":%b,"content":""},"logprobs":null,"finish_reason":null' % role
    opened: set[int] = set()
    async for batch in generation.deltas():
        frames = []
        for choice, delta in batch:
            usage = call.usage_member(generation) if call.continuous_usage else b""
            if choice.index not in opened:
                opened.add(choice.index)
                frames.append(chunks.choice(choice.index, opening, usage=usage))
            for member in _members(call, body, parsers[choice.index], delta):
                frames.append(chunks.choice(choice.index, member, usage=usage))
        yield frames[0] if len(frames) == 1 else b"".join(frames)
    if call.include_usage:
        yield chunks.last(call.usage_member(generation))


def _members(call: Call, body: ChatBody, parser: OutputParser, delta: Delta) -> list[bytes]:
    """The chunks of one event: all its deltas, the last one with log probabilities and the finish reason."""
    if parser.is_plain and delta.finish_reason is None and not body.logprobs and not body.return_token_ids:
        return [b'"delta":{"content":%b},"logprobs":null,"finish_reason":null' % _encode(delta.text)]
    deltas = parser.push(delta.text)
    finish_reason = delta.finish_reason
    if finish_reason is not None:
        deltas += parser.finish()
        finish_reason = parser.message(ChatMessage(), finish_reason)
        deltas = deltas or [{}]
    elif not deltas and (body.logprobs or body.return_token_ids):
        deltas = [{}]  # the text is held back, but its tokens are told now
    members = [b'"delta":%b,"logprobs":null,"finish_reason":null' % _encode(item) for item in deltas[:-1]]
    if deltas:
        logprobs = _encode(_logprobs(call, body, delta.logprobs))
        member = b'"delta":%b,"logprobs":%b,"finish_reason":%b' % (
            _encode(deltas[-1]),
            logprobs,
            _encode(finish_reason),
        )
        if finish_reason is not None:
            member += b',"stop_reason":%b' % _encode(delta.stop_reason)
        if body.return_token_ids:
            member += b',"token_ids":%b' % _encode(delta.token_ids)
        members.append(member)
    return members
