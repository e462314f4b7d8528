"""The body of POST /v1/responses and its translation into the chat API's terms: messages, tools, response format.

Called by ``responses.py``. After this everything runs as a chat completion does: same template, same tools, same
limits.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from outrider.errors import RequestError
from outrider.server.protocol import MAX_MESSAGES, ChatBody, Count, Id, SamplingBody

_PART_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class ResponsesBody(SamplingBody, kw_only=True):
    """POST /v1/responses. ``input`` is a text or a list of items: messages, function calls and their outputs."""

    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    top_logprobs: Count | None = None
    previous_response_id: Id | None = None
    store: bool | None = None
    background: bool | None = None
    reasoning: dict[str, Any] | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    conversation: Any = None
    prompt: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


def check_body(body: ResponsesBody) -> None:
    """Refuse what would otherwise be ignored in silence."""
    if (body.n or 1) != 1:
        raise RequestError("A response has one answer; remove n.", param="n")
    if not body.tools and body.tool_choice not in (None, "auto", "none"):
        raise RequestError("tool_choice needs tools; send tools or remove it.", param="tool_choice")
    if body.conversation is not None:
        raise RequestError(
            "conversation is not supported; continue one by previous_response_id.", param="conversation"
        )
    if body.prompt is not None:
        raise RequestError("Stored prompts are not supported; send input and instructions.", param="prompt")
    if body.top_logprobs:
        raise RequestError("top_logprobs is available in /v1/chat/completions only.", param="top_logprobs")
    if body.truncation not in (None, "disabled"):
        raise RequestError("truncation can only be 'disabled'.", param="truncation")
    if body.max_output_tokens == 0:
        raise RequestError("max_output_tokens must be at least 1, got 0.", param="max_output_tokens")
    if body.background and body.stream:
        raise RequestError("A background response cannot be streamed; poll it by its id.", param="background")
    if body.background and body.store is False:
        raise RequestError("A background response must be stored; set store to true.", param="store")


def chat_body(body: ResponsesBody, earlier: list[dict[str, Any]], new: list[dict[str, Any]]) -> ChatBody:
    """The conversation so far as a chat request: instructions, earlier turns, new ones."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*system, *earlier, *new]
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"The conversation has more than {MAX_MESSAGES} messages; start another.", param="input"
        )
    return ChatBody(
        messages=messages,
        tools=_tools(body.tools),
        tool_choice=body.tool_choice,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def response_format(body: ResponsesBody) -> dict[str, Any] | None:
    """``text.format`` as the ``response_format`` of the chat API."""
    form = (body.text or {}).get("format")
    if not isinstance(form, dict | None):
        raise RequestError("text.format must be an object.", param="text.format")
    if form is not None and form.get("type") == "json_schema":
        return {
            "type": "json_schema",
            "json_schema": {"name": form.get("name"), "schema": form.get("schema")},
        }
    return form


def input_messages(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages of the ``input`` field; calls that follow each other become one assistant's turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(
                {"role": item.get("role"), "content": _content(item.get("content"), f"input[{i}]")}
            )
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(_function_call(item))
        elif kind == "function_call_output":
            output = _content(item.get("output"), f"input[{i}].output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":  # a model that does not reason has no use for another's reasoning
            raise RequestError(
                f"input[{i}] has the type '{kind}', which is not supported.", param=f"input[{i}]"
            )
    return messages


def _function_call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _PART_TYPES:
        return {**part, "type": _PART_TYPES[kind]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise RequestError(f"{where} must be an input_text or an input_image with image_url.", param=where)


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools are flat here and nested in the chat API; an empty list means none."""
    for i, tool in enumerate(tools or []):
        if tool.get("type") != "function":
            raise RequestError(
                f"tools[{i}] has the type '{tool.get('type')}'; only 'function' is supported.",
                param=f"tools[{i}]",
            )
    return [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        for tool in tools or []
    ] or None
