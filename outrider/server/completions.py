"""POST /v1/completions: body in, whole or streamed text out. The keys and their order are the wire format."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from itertools import repeat
from typing import cast

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from outrider.errors import RequestError
from outrider.server.call import Call
from outrider.server.chunks import ChunkWriter, ending
from outrider.server.context import ServerContext
from outrider.server.generation import Choice, Delta, Generation, Prompt
from outrider.server.logprobs import CompletionLogprobWriter, prompt_logprobs
from outrider.server.protocol import (
    MAX_BATCH,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
)
from outrider.server.sampling import output_budget, sampling_params, truncate
from outrider.types import TokenLogprobs

DEFAULT_MAX_TOKENS = 16

_encode = msgspec.json.encode


async def create_completion(context: ServerContext, http: HttpRequest, body: CompletionBody) -> Response:
    """Handle one call; raises ``RequestError`` before anything reaches the engine."""
    call = Call.begin(context, http, body, "cmpl-")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    _check(body, max_tokens)
    prompts = await _prompts(context, body, max_tokens)
    wanted_prompt_logprobs = body.prompt_logprobs
    if wanted_prompt_logprobs is None and body.echo:
        wanted_prompt_logprobs = body.logprobs
    params = [
        sampling_params(
            context,
            body,
            max_tokens=output_budget(context, max(1, max_tokens), len(prompt.ids)),
            logprobs=body.logprobs,
            prompt_logprobs=wanted_prompt_logprobs,
        )
        for prompt in prompts
    ]
    generation = call.generation(body, prompts, params, score_only=max_tokens == 0)
    writers = [_ChoiceWriter(context, body, choice) for choice in generation.choices]
    return await call.answer(
        body,
        generation,
        whole=lambda: _whole(call, generation, writers),
        frames=lambda: _frames(call, generation, writers),
    )


class _ChoiceWriter:
    """Adds to a choice's deltas what the body asks for: echo, log probabilities, token ids."""

    def __init__(self, context: ServerContext, body: CompletionBody, choice: Choice) -> None:
        prompt_ids = choice.request.prompt_token_ids
        self.returns_ids = bool(body.return_token_ids)
        self._prompt_ids: list[int] | None = prompt_ids
        self.plain = not (body.echo or body.logprobs is not None or body.return_token_ids)
        self._tokenizer = context.tokenizer
        self._echo_ids = prompt_ids if body.echo and not body.return_token_ids else None
        self._logprobs = None
        if body.logprobs is not None:
            as_token_ids = context.writes_token_ids(body.return_tokens_as_token_ids)
            self._logprobs = CompletionLogprobWriter(context.tokenizer, as_token_ids=as_token_ids)

    def apply(self, delta: Delta, prompt: Prompt) -> CompletionLogprobs | None:
        """Edit ``delta`` in place and return the log probabilities of its text."""
        ids = delta.token_ids
        entries: list[TokenLogprobs | None] = list(delta.logprobs or [])
        if self._echo_ids is not None:
            delta.text = self._echo_text(prompt) + delta.text
            ids = [*self._echo_ids, *ids]
            entries = [*(delta.prompt_logprobs or repeat(None, len(self._echo_ids))), *entries]
            self._echo_ids = None
        return self._logprobs.write(ids, entries) if self._logprobs else None

    def take_prompt_ids(self) -> list[int] | None:
        """The prompt's token ids, once: later chunks of a stream do not repeat them."""
        ids, self._prompt_ids = self._prompt_ids, None
        return ids

    def _echo_text(self, prompt: Prompt) -> str:
        return self._tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text


def _check(body: CompletionBody, max_tokens: int) -> None:
    if body.suffix is not None:
        raise RequestError("suffix is not currently supported; remove it.", param="suffix")
    if body.prompt_embeds is not None:
        raise RequestError("prompt_embeds is not supported; send prompt.", param="prompt_embeds")
    if max_tokens == 0 and not body.echo:
        raise RequestError(
            "max_tokens must be at least 1, got 0; 0 is possible with echo only.", param="max_tokens"
        )
    if body.stream and body.prompt_logprobs:
        raise RequestError("prompt_logprobs is not available with stream.", param="prompt_logprobs")


async def _prompts(context: ServerContext, body: CompletionBody, max_tokens: int) -> list[Prompt]:
    prompt = body.prompt
    if not prompt:
        raise RequestError("prompt is required and must not be empty.", param="prompt")
    if isinstance(prompt, str):
        items: list[str | list[int]] = [prompt]
    elif all(isinstance(item, int) for item in prompt):
        items = [cast(list[int], prompt)]
    elif all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        items = cast(list[str | list[int]], prompt)
    else:
        raise RequestError(
            "prompt must hold only texts, only token ids, or only lists of token ids.", param="prompt"
        )
    if len(items) > MAX_BATCH:
        raise RequestError(f"At most {MAX_BATCH} prompts fit a request, got {len(items)}.", param="prompt")
    num_chars = sum(len(item) for item in items if isinstance(item, str))
    return [await _prompt(context, body, item, max_tokens, num_chars) for item in items]


async def _prompt(
    context: ServerContext, body: CompletionBody, item: str | list[int], max_tokens: int, num_chars: int
) -> Prompt:
    if isinstance(item, str):
        special, text = body.add_special_tokens is not False, item
        ids = await context.encode(item, add_special_tokens=special, num_chars=num_chars) if item else []
    else:
        ids, text = item, None
        if ids and max(ids) >= context.vocab_size:
            raise RequestError(
                f"prompt holds the token id {max(ids)}, but ids must be below {context.vocab_size}.",
                param="prompt",
            )
        if context.model_config.image_token_id in ids:
            raise RequestError("prompt holds image tokens; send images through chat.", param="prompt")
    if not ids:
        raise RequestError("prompt must not be empty.", param="prompt")
    kept = truncate(context, body, ids, max_tokens)
    return Prompt(kept, text if kept is ids else None)


async def _whole(call: Call, generation: Generation, writers: list[_ChoiceWriter]) -> CompletionResponse:
    context = call.context
    choices = [CompletionChoice(index=choice.index, text="") for choice in generation.choices]
    texts: list[list[str]] = [[] for _ in choices]
    async for batch in generation.deltas():
        for choice, delta in batch:
            out, writer = choices[choice.index], writers[choice.index]
            if delta.prompt_logprobs is not None:
                out.prompt_logprobs = prompt_logprobs(context.tokenizer, delta.prompt_logprobs)
            new = (
                None
                if writer.plain
                else writer.apply(delta, generation.prompts[choice.index // generation.n])
            )
            texts[choice.index].append(delta.text)
            out.logprobs = _joined(out.logprobs, new)
            out.finish_reason, out.stop_reason = delta.finish_reason, delta.stop_reason
            if writer.returns_ids:
                if (ids := writer.take_prompt_ids()) is not None:
                    out.prompt_token_ids = ids
                out.token_ids = out.token_ids or []
                out.token_ids += delta.token_ids
    for out, parts in zip(choices, texts, strict=True):
        out.text = "".join(parts)
    return CompletionResponse(
        id=call.id, created=call.created, model=call.model, choices=choices, usage=call.usage(generation)
    )


def _joined(old: CompletionLogprobs | None, new: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if old is None or new is None:
        return old or new
    old.text_offset += new.text_offset
    old.token_logprobs += new.token_logprobs
    old.tokens += new.tokens
    old.top_logprobs += new.top_logprobs
    return old


async def _frames(
    call: Call, generation: Generation, writers: list[_ChoiceWriter]
) -> AsyncGenerator[bytes, None]:
    chunks = ChunkWriter(id=call.id, object="text_completion", created=call.created, model=call.model)
    async for batch in generation.deltas():
        frames = []
        for choice, delta in batch:
            writer = writers[choice.index]
            logprobs: bytes = b"null"
            extra = b""
            if not writer.plain:
                prompt = generation.prompts[choice.index // generation.n]
                logprobs = _encode(writer.apply(delta, prompt))
                if writer.returns_ids:
                    ids = _encode(writer.take_prompt_ids()), _encode(delta.token_ids)
                    extra = b',"prompt_token_ids":%b,"token_ids":%b' % ids
            tail = ending(delta.finish_reason, delta.stop_reason) + extra
            member = b'"text":%b,"logprobs":%b%b' % (_encode(delta.text), logprobs, tail)
            usage = call.usage_member(generation) if call.continuous_usage else b""
            frames.append(chunks.choice(choice.index, member, usage=usage))
        yield frames[0] if len(frames) == 1 else b"".join(frames)
    if call.include_usage:
        yield chunks.last(call.usage_member(generation))
