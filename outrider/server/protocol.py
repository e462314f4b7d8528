"""The JSON bodies of the OpenAI API as typed structs: what clients may send, and what they get back.

Numeric ranges that need no knowledge of the model are written here, as constraints that the decoder enforces;
the rest is checked in ``sampling.py``. Field order of the response structs is the order of keys on the wire.
Unknown request fields are ignored, as clients expect. No logic beyond decoding.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from outrider.errors import RequestError

MAX_N = 128
MAX_BATCH = 1024
MAX_STOP_STRINGS = 64
MAX_MESSAGES = 4096
MAX_JSON_NODES = 1 << 18
"""Texts of a body, and its lists and objects; they cost far more than their bytes."""

MAX_JSON_VALUES = 1 << 22
"""Members and elements of a body, numbers for the most part."""

MAX_DETOKENIZE_IDS = 1 << 20

CHECKED_FROM_BYTES = 512 << 10
"""A smaller body cannot hold as many: no text, list or object is shorter than two bytes."""
_INT64 = 2**63

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[Count], Meta(max_length=1 << 24)]
StopString = Annotated[str, Meta(min_length=1, max_length=512)]
Id = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(msgspec.Struct):
    """``include_usage`` adds a last chunk with token counts, ``continuous_usage_stats`` adds them to every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(msgspec.Struct, kw_only=True):
    """The fields that completions and chat share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[Count], Meta(min_length=1, max_length=1 << 20)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Id | None = None
    request_id: Id | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    use_beam_search: bool | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[Count] | None = None
    repetition_detection: dict[str, Any] | None = None
    thinking_token_budget: Count | None = None


class CompletionBody(SamplingBody, kw_only=True):
    """POST /v1/completions. ``prompt`` is a text, token ids, or a list of either."""

    prompt: str | list[str | Count | TokenIds] | None = None
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: str | None = None
    prompt_embeds: Any = None


class ChatBody(SamplingBody, kw_only=True):
    """POST /v1/chat/completions. Messages keep their shape: the chat template reads them."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a ``prompt``, or ``messages`` for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Count], Meta(max_length=MAX_DETOKENIZE_IDS)]


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """How many prompt tokens came out of the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """Token counts of a response; every prompt is counted once, however many choices it has."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """One entry per token; ``top_logprobs`` maps token texts to values, the token itself first."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/completions; null keys are part of the format."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: None = None
    system_fingerprint: None = None
    usage: Usage
    kv_transfer_params: None = None


class TopLogprob(msgspec.Struct, kw_only=True):
    """A token, its log probability and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, kw_only=True):
    """The sampled token and its strongest rivals."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log probabilities of a chat choice, one entry per generated token."""

    content: list[ChatTokenLogprob]


class ChatMessage(msgspec.Struct, kw_only=True):
    """What the assistant said; ``tool_calls`` is present only when there are some."""

    role: str = "assistant"
    content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[dict[str, Any]] | UnsetType = UNSET
    reasoning: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer to the conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(msgspec.Struct, kw_only=True):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: None = None
    system_fingerprint: None = None
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: None = None


Body = TypeVar("Body", bound=msgspec.Struct)
_AT = re.compile(r"^(.*?)(?: - at `\$?\.?(.*)`)?$", re.DOTALL)


@functools.cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """Decode a request body; ``RequestError`` names the field that is wrong and what it must be."""
    _check_nodes(body)
    try:
        decoded: Body = _decoder(kind).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        message, path = _AT.match(str(error)).groups()  # type: ignore[union-attr]  # the pattern matches any text
        reason = message.replace("`", "'").rstrip(".")
        where = f"Field '{path}': " if path else ""
        raise RequestError(f"{where}{reason}.", param=path or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("The body is not valid JSON; send one JSON object encoded as UTF-8.") from error


def _check_nodes(body: bytes) -> None:
    """Refuse a body whose decoding would take seconds, before it is decoded."""
    if len(body) < CHECKED_FROM_BYTES:
        return
    if b"\\" in body:  # escaped quotes end no text
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    is_fine = body.count(b'"') <= 2 * MAX_JSON_NODES
    if is_fine:
        outside = b"".join(body.split(b'"')[::2])
        is_fine = outside.count(b"[") + outside.count(b"{") <= MAX_JSON_NODES
        is_fine = is_fine and outside.count(b",") <= MAX_JSON_VALUES
    if not is_fine:
        raise RequestError(
            f"The body holds more than {MAX_JSON_NODES:,} texts or lists, or {MAX_JSON_VALUES:,} values; "
            "send less at a time."
        )
