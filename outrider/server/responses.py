"""POST /v1/responses and its relatives: the newer API over the same engine, template and tools as chat.

``Responses`` holds the routes' logic and the store. The answer is built by ``responses_stream``; the body is
translated by ``responses_input``.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from outrider.errors import EngineError, RequestError
from outrider.server.call import Call
from outrider.server.chat import OutputParser, output_parser
from outrider.server.context import ServerContext
from outrider.server.errors import JSONResponse, error_body
from outrider.server.generation import Generation
from outrider.server.messages import render_chat
from outrider.server.protocol import ChatMessage
from outrider.server.response_store import ResponseStore, StoredResponse
from outrider.server.responses_input import (
    ResponsesBody,
    chat_body,
    check_body,
    input_messages,
    response_format,
)
from outrider.server.responses_stream import ResponseBuilder, event_frame
from outrider.server.sampling import output_budget, sampling_params
from outrider.server.streaming import (
    CLIENT_CLOSED_REQUEST,
    ClientGoneError,
    EventStreamResponse,
    unless_disconnected,
)
from outrider.server.tools import constrained, tool_use
from outrider.types import SamplingParams

logger = logging.getLogger("outrider.server")


class Responses:
    """The four routes under /v1/responses."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._store = ResponseStore()

    async def create(self, http: HttpRequest, body: ResponsesBody) -> Response:
        """Make a response: whole, streamed, or in the background."""
        job = await self._prepare(http, body)
        if body.background:
            return JSONResponse(self._in_background(job))
        if body.stream:
            return EventStreamResponse(self._frames(job), job.generation.close, ending=b"")
        try:
            return JSONResponse(await unless_disconnected(http.receive, self._whole(job)))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            job.generation.close()

    def get(self, http: HttpRequest, response_id: str) -> Response:
        """The stored response as it is now."""
        return JSONResponse(self._store.get(response_id, tenant_of(http)).response)

    def delete(self, http: HttpRequest, response_id: str) -> Response:
        """Forget a stored response."""
        entry = self._store.get(response_id, tenant_of(http))
        if entry.task is not None:
            entry.task.cancel()
        self._store.drop(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    def cancel(self, http: HttpRequest, response_id: str) -> Response:
        """Stop a response that is made in the background."""
        entry = self._store.get(response_id, tenant_of(http))
        if entry.task is None:
            raise RequestError(
                "Only a background response that still runs can be cancelled.", param="response_id"
            )
        entry.task.cancel()
        entry.task = None
        entry.response["status"] = "cancelled"
        return JSONResponse(entry.response)

    async def _prepare(self, http: HttpRequest, body: ResponsesBody) -> Job:
        check_body(body)
        body.response_format = response_format(body)
        call = Call.begin(self._context, http, body, "resp_")
        earlier: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            previous = body.previous_response_id
            earlier = self._store.get(previous, tenant_of(http), "previous_response_id").messages
        new = input_messages(body.input)
        chat = chat_body(body, earlier, new)
        use = tool_use(chat.tools, body.tool_choice if chat.tools else None, body.parallel_tool_calls)
        prompt = await render_chat(self._context, chat)
        params = sampling_params(
            self._context,
            body,
            max_tokens=output_budget(self._context, body.max_output_tokens, len(prompt.ids)),
            logprobs=None,
            prompt_logprobs=None,
        )
        generation = call.generation(body, [prompt], [constrained(params, use)])
        builder = ResponseBuilder(_skeleton(call, body, params))
        entry = StoredResponse(builder.response, [*earlier, *new], tenant_of(http))
        parser = output_parser(self._context, use)
        return Job(call, generation, parser, builder, entry, is_stored=body.store is not False)

    def _in_background(self, job: Job) -> dict[str, Any]:
        async def run() -> None:
            try:
                await self._whole(job)
            except (RequestError, EngineError) as error:
                job.builder.fail("server_error", str(error))
            except Exception:
                logger.exception("A background response failed.")
                job.builder.fail("server_error", "The server failed on this response; its log says why.")
            finally:
                job.generation.close()
                job.entry.task = None

        job.entry.task = asyncio.create_task(run())
        self._store.put(job.entry)
        return job.entry.response

    async def _whole(self, job: Job) -> dict[str, Any]:
        async for _ in self._events(job):
            pass
        return job.builder.response

    async def _frames(self, job: Job) -> AsyncGenerator[bytes, None]:
        try:
            async for events in self._events(job):
                if events:
                    yield b"".join(map(event_frame, events))
        except (RequestError, EngineError) as error:
            failure = error_body(error)["error"]
            code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
            yield b"".join(map(event_frame, job.builder.fail(code, failure["message"])))

    async def _events(self, job: Job) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The events of a response, batch by batch; at the end it is complete and, if wished, stored."""
        builder, parser = job.builder, job.parser
        yield builder.start()
        async for batch in job.generation.deltas():
            for _, delta in batch:
                yield builder.feed(parser.push(delta.text))
                if delta.finish_reason is not None:
                    yield builder.feed(parser.finish())
                    self._keep(job, parser, delta.finish_reason)
                    yield builder.finish(delta.finish_reason, job.call.usage(job.generation))
        if job.is_stored and job.entry.response["status"] != "cancelled":
            self._store.put(job.entry)

    def _keep(self, job: Job, parser: OutputParser, finish_reason: str) -> None:
        """Add the answer to the conversation that the next response may continue."""
        message = ChatMessage()
        parser.message(message, finish_reason)
        turn: dict[str, Any] = {"role": "assistant", "content": message.content}
        if message.tool_calls is not msgspec.UNSET:
            turn["tool_calls"] = message.tool_calls
        job.entry.messages.append(turn)


class Job(msgspec.Struct, frozen=True):
    """A response in the making."""

    call: Call
    generation: Generation
    parser: OutputParser
    builder: ResponseBuilder
    entry: StoredResponse
    is_stored: bool


def tenant_of(http: HttpRequest) -> str:
    """Who is calling: differs between API keys, empty without keys."""
    return str(http.scope.get("outrider.tenant", ""))


def _skeleton(call: Call, body: ResponsesBody, params: SamplingParams) -> dict[str, Any]:
    """The response object before anything is generated."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",  # never the client's request id: it would name another's stored response
        "object": "response",
        "created_at": call.created,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": call.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
