"""What a handler knows about the HTTP call beside its body: identity, isolation salt, and how to answer it.

Turns a ``Generation`` into a streamed or a whole response; shared by completions, chat and the later endpoints.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from outrider.errors import RequestError
from outrider.server.context import ServerContext
from outrider.server.errors import JSONResponse
from outrider.server.generation import Generation, Prompt
from outrider.server.protocol import (
    MAX_BATCH,
    Body,
    PromptTokensDetails,
    SamplingBody,
    StreamOptions,
    Usage,
    decode_body,
)
from outrider.server.streaming import (
    CLIENT_CLOSED_REQUEST,
    ClientGoneError,
    EventStreamResponse,
    unless_disconnected,
)
from outrider.types import SamplingParams

logger = logging.getLogger("outrider.server")

MAX_CHOICES_BYTES = 512 << 20
"""Prompts, images and token lists of all choices of a request, each of which is sent to the engine."""

_ID_BYTES = 32
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


async def read_body(http: HttpRequest, kind: type[Body]) -> Body:
    """Read and decode the JSON body; ``RequestError`` for another media type or a wrong field."""
    media_type = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError("The Content-Type must be application/json.", param="Content-Type")
    return decode_body(await http.body(), kind)


@dataclass(frozen=True)
class Call:
    """One API call. ``id`` is what the client sees, ``engine_id`` is unique even if clients repeat ids."""

    context: ServerContext
    http: HttpRequest
    id: str
    engine_id: str
    created: int
    cache_salt: str
    include_usage: bool
    continuous_usage: bool

    @classmethod
    def begin(cls, context: ServerContext, http: HttpRequest, body: SamplingBody, prefix: str) -> Call:
        """Identify the call; checks the fields that every generating endpoint shares."""
        context.check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream to be true.", param="stream_options")
        own = uuid.uuid4().hex
        given = http.headers.get(REQUEST_ID_HEADER) or body.request_id
        if given and not _REQUEST_ID.fullmatch(given):
            raise RequestError(
                "The request id must be 1 to 256 printable ASCII characters.", param="request_id"
            )
        call_id = prefix + (given or own)
        engine_id = f"{call_id}-{own}" if given else call_id
        salt = _cache_salt(http.scope.get("outrider.tenant", ""), body.cache_salt)
        options = body.stream_options or StreamOptions()
        return cls(
            context,
            http,
            call_id,
            engine_id,
            int(time.time()),
            salt,
            include_usage=bool(options.include_usage) or context.server_config.enable_force_include_usage,
            continuous_usage=bool(options.continuous_usage_stats),
        )

    @property
    def model(self) -> str:
        """The name that responses carry."""
        return self.context.model_names[0]

    def generation(
        self,
        body: SamplingBody,
        prompts: list[Prompt],
        params: list[SamplingParams],
        *,
        score_only: bool = False,
    ) -> Generation:
        """The started generation of all prompts and choices."""
        n = body.n or 1
        if len(prompts) * n > MAX_BATCH:
            raise RequestError(
                f"A request may ask for at most {MAX_BATCH} choices in all, got {len(prompts)} prompts x n={n}.",
                param="n",
            )
        sizes = (_num_bytes(prompt, sampling) for prompt, sampling in zip(prompts, params, strict=True))
        if n * sum(sizes) > MAX_CHOICES_BYTES:
            raise RequestError(
                f"The choices of this request need more than {MAX_CHOICES_BYTES >> 20} MiB together; "
                "send fewer or smaller prompts, images or token lists, or a smaller n.",
                param="n",
            )
        generation = Generation(
            self.context,
            self.engine_id,
            prompts,
            params,
            n=n,
            cache_salt=self.cache_salt,
            priority=body.priority or 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            score_only=score_only,
        )
        if self.context.server_config.enable_log_requests:  # parameters only: prompts are never logged
            logger.info("Request %s: %d prompt(s), n=%d, %s", self.engine_id, len(prompts), n, params[0])
        generation.start()
        return generation

    def usage(self, generation: Generation) -> Usage:
        """Token counts of ``generation`` so far."""
        prompt, completion = generation.num_prompt_tokens, generation.num_completion_tokens
        details = None
        if self.context.server_config.enable_prompt_tokens_details:
            details = PromptTokensDetails(cached_tokens=generation.num_cached_tokens)
        return Usage(
            prompt_tokens=prompt,
            total_tokens=prompt + completion,
            completion_tokens=completion,
            prompt_tokens_details=details,
        )

    def usage_member(self, generation: Generation) -> bytes:
        """``,"usage":{...}`` of a chunk; unlike in whole answers, null keys are left out."""
        counts = msgspec.structs.asdict(self.usage(generation))
        return b',"usage":' + msgspec.json.encode(
            {key: value for key, value in counts.items() if value is not None}
        )

    async def answer(
        self,
        body: SamplingBody,
        generation: Generation,
        *,
        whole: Callable[[], Coroutine[Any, Any, msgspec.Struct]],
        frames: Callable[[], AsyncGenerator[bytes, None]],
    ) -> Response:
        """Stream ``frames`` or return ``whole``; the generation is aborted when the client leaves."""
        if body.stream:
            return EventStreamResponse(frames(), generation.close)
        try:
            return JSONResponse(await unless_disconnected(self.http.receive, whole()))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            generation.close()


def _num_bytes(prompt: Prompt, sampling: SamplingParams) -> int:
    """Memory of one choice in the engine, roughly."""
    num_ids = len(prompt.ids) + len(sampling.allowed_token_ids)
    return num_ids * _ID_BYTES + sum(len(image.pixels) for image in prompt.images)


def _cache_salt(tenant: str, salt: str | None) -> str:
    """Prompts are shared between requests only when key and ``cache_salt`` agree."""
    if not tenant and not salt:
        return ""
    return hashlib.sha256(f"{tenant}\0{salt or ''}".encode()).hexdigest()[:32]
