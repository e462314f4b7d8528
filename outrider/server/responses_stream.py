"""Builds a response object out of message deltas, and the typed events that tell a client about it.

Used by ``responses.py`` for streamed and whole answers alike, so both give the same object. Source of names and
fields: the OpenAI Responses API. Knows no HTTP.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from outrider.server.protocol import Usage

Event = dict[str, Any]


def event_frame(event: Event) -> bytes:
    """A server-sent event with its name."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))


class ResponseBuilder:
    """One response on its way from ``in_progress`` to its end. ``response`` is the object as clients see it."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        self._output: list[dict[str, Any]] = response["output"]
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._num_events = 0

    def start(self) -> list[Event]:
        """The response exists and is being worked on."""
        return [self._snapshot("response.created"), self._snapshot("response.in_progress")]

    def feed(self, deltas: list[dict[str, Any]]) -> list[Event]:
        """Events for the deltas of a chat message: content, and calls with their arguments."""
        events: list[Event] = []
        for delta in deltas:
            if delta.get("content"):
                events += self._text(delta["content"])
            for call in delta.get("tool_calls", ()):
                events += self._call(call) if "id" in call else self._arguments(call["function"]["arguments"])
        return events

    def finish(self, finish_reason: str | None, usage: Usage) -> list[Event]:
        """Close what is open; ``length`` leaves the response incomplete."""
        is_cut = finish_reason == "length"
        events = [] if self._output else self._open_message()
        events += self._close("incomplete" if is_cut else "completed")
        response = self.response
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        response["status"] = "incomplete" if is_cut else "completed"
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._snapshot(f"response.{response['status']}")]

    def fail(self, code: str, message: str) -> list[Event]:
        """The response has ended by an error."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        return [self._snapshot("response.failed")]

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _snapshot(self, kind: str) -> Event:
        return self._event(kind, response={**self.response, "output": list(self._output)})

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1}

    def _begin(self, item: dict[str, Any]) -> Event:
        self._open = item
        self._pieces = []
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item={**item})

    def _open_message(self) -> list[Event]:
        item = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        added = self._begin(item)
        part = _text_part("")
        return [
            added,
            self._event("response.content_part.added", **self._where(), content_index=0, part=part),
        ]

    def _text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != "message":
            events = [*self._close("completed"), *self._open_message()]
        self._pieces.append(text)
        where = self._where()
        events.append(
            self._event("response.output_text.delta", **where, content_index=0, delta=text, logprobs=[])
        )
        return events

    def _call(self, call: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": "",
        }
        return [*events, self._begin(item)]

    def _arguments(self, text: str) -> list[Event]:
        self._pieces.append(text)
        return [self._event("response.function_call_arguments.delta", **self._where(), delta=text)]

    def _close(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        where, text = self._where(), "".join(self._pieces)
        item["status"] = status
        if item["type"] == "message":
            part = _text_part(text)
            item["content"] = [part]
            events = [
                self._event("response.output_text.done", **where, content_index=0, text=text, logprobs=[]),
                self._event("response.content_part.done", **where, content_index=0, part=part),
            ]
        else:
            item["arguments"] = text
            events = [
                self._event(
                    "response.function_call_arguments.done", **where, name=item["name"], arguments=text
                )
            ]
        self._open = None
        done = self._event("response.output_item.done", output_index=where["output_index"], item={**item})
        return [*events, done]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
