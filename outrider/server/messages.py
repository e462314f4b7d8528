"""Chat messages to a prompt: checks their shape, renders the template, encodes. Called by chat and tokenize.

The template decides how a conversation looks; here only roles and content types are checked, so that what the
template gets is what it expects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from outrider.errors import RequestError
from outrider.server.context import THREAD_THRESHOLD_CHARS, ServerContext
from outrider.server.generation import Prompt

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class ChatFields(Protocol):
    """The fields of a body that make the prompt."""

    messages: Any
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    add_special_tokens: bool | None


async def render_chat(
    context: ServerContext, body: ChatFields, *, documents: Sequence[Mapping[str, Any]] | None = None
) -> Prompt:
    """The prompt of a conversation, in a thread when it is long."""
    template = context.template
    if template is None:
        raise RequestError("This model has no chat template; give --chat-template or use /v1/completions.")
    if getattr(body, "chat_template", None) is not None:
        raise RequestError("chat_template is set by the server only; remove it.", param="chat_template")
    continue_final = bool(body.continue_final_message)
    add_prompt = not continue_final if body.add_generation_prompt is None else body.add_generation_prompt
    if continue_final and add_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true.",
            param="continue_final_message",
        )
    if body.tools:
        _ = context.shows_tools
    urls: list[str] = []
    messages = [
        _message(message, i, template.iterates_content, urls) for i, message in enumerate(body.messages)
    ]
    variables = context.server_config.default_chat_template_kwargs | (body.chat_template_kwargs or {})

    def render() -> list[int]:
        segments = template.render(
            messages,
            tools=body.tools,
            documents=documents,
            add_generation_prompt=add_prompt,
            continue_final_message=continue_final,
            variables=variables,
        )
        prefix = context.tokenizer.encode("") if body.add_special_tokens else []
        return prefix + context.tokenizer.encode_segments(segments)

    num_chars = _num_chars([messages, body.tools, documents, variables])
    if num_chars > context.tokenizer.max_chars(context.max_model_len):
        raise RequestError(
            f"This model's maximum context length is {context.max_model_len} tokens and messages of "
            f"{num_chars} characters cannot fit; shorten them.",
            param="input_text",
        )
    ids = render() if num_chars < THREAD_THRESHOLD_CHARS else await asyncio.to_thread(render)
    return await _with_images(context, ids, urls) if urls else Prompt(ids)


async def _with_images(context: ServerContext, ids: list[int], urls: list[str]) -> Prompt:
    """Load the images and put their tokens in the places that the template marked."""
    media = context.media
    if media is None:
        raise RequestError("This model takes no images; remove the image parts.", param="messages")
    if ids.count(media.processor.tokens.image) != len(urls):
        raise RequestError("The chat template has no place for these images.", param="messages")
    prompt_ids, images = media.processor.expand(ids, await media.load(urls))
    return Prompt(prompt_ids, images=images)


def _message(message: dict[str, Any], index: int, as_parts: bool, urls: list[str]) -> dict[str, Any]:
    """A copy of ``message`` that a template can read: a known role, content as text or as a list of parts.

    The URLs of its images are appended to ``urls``.
    """
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(
            f"messages[{index}].role must be one of {', '.join(ROLES[:5])}.", param=f"messages[{index}].role"
        )
    result = dict(message)
    if role == "developer":  # the newer name of the system role, unknown to templates
        result["role"] = "system"
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            where = f"messages[{index}].tool_calls"
            raise RequestError(f"{where} must be a list of calls.", param=where)
        result["tool_calls"] = [_tool_call(call, index) for call in calls]
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise RequestError(f"messages[{index}].content is required.", param=f"messages[{index}].content")
        result["content"] = ""
    elif isinstance(content, list):
        parts = [_part(part, f"messages[{index}].content[{i}]", urls) for i, part in enumerate(content)]
        result["content"] = parts if as_parts else "\n".join(part.get("text", "") for part in parts)
    elif not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content must be a text or a list of parts.",
            param=f"messages[{index}].content",
        )
    return result


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    """A call the model made earlier; templates read its arguments as an object, clients send them as JSON text."""
    where = f"messages[{index}].tool_calls"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must hold objects with function.name.", param=where)
    arguments = function.get("arguments") or "{}"
    try:
        parsed = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{where}: function.arguments must be JSON.", param=where) from error
    return {**call, "function": {**function, "arguments": parsed}}


def _part(part: Any, where: str, urls: list[str]) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be an object with a type.", param=where)
    kind = part.get("type")
    if kind in ("image_url", "input_image"):
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise RequestError(f"{where}.image_url must have a url.", param=where)
        urls.append(url)
        return {"type": "image"}
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind in _TEXT_PARTS and isinstance(text, str):
        return {"type": "text", "text": text}
    raise RequestError(f"{where} must be of type 'text' or 'image_url'.", param=where)


def _num_chars(value: Any) -> int:
    """Characters of all texts in a JSON value, however deeply it is nested."""
    count, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, dict):
            waiting += item
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return count
