"""Remembers responses for ``previous_response_id`` and GET, in memory, within a number of bytes.

Owned by ``responses.py``. A response is visible to the API key that made it and to no other; the least recently
used ones are forgotten first, and all of them when the server ends.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from outrider.errors import NotFoundError

MAX_STORE_BYTES = 64 << 20
MAX_RESPONSES = 4096


@dataclass
class StoredResponse:
    """A response and the conversation that it ends; ``task`` while it is made in the background."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    tenant: str
    task: asyncio.Task[None] | None = None
    num_bytes: int = field(default=0)


class ResponseStore:
    """Least recently used responses by id."""

    def __init__(self, max_bytes: int = MAX_STORE_BYTES, max_responses: int = MAX_RESPONSES) -> None:
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._num_bytes = 0
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, entry: StoredResponse) -> None:
        """Remember ``entry``, or account for its growth; one larger than the store is not kept."""
        self.drop(entry.response["id"])
        entry.num_bytes = len(msgspec.json.encode([entry.response, entry.messages]))
        if entry.num_bytes > self._max_bytes:
            return
        self._entries[entry.response["id"]] = entry
        self._num_bytes += entry.num_bytes
        while self._num_bytes > self._max_bytes or len(self._entries) > self._max_responses:
            self.drop(next(iter(self._entries)))

    def get(self, response_id: str, tenant: str, param: str = "response_id") -> StoredResponse:
        """The entry of ``response_id``; ``NotFoundError`` if it is unknown, forgotten or another key's.

        ``param`` names the field that the id came in.
        """
        entry = self._entries.get(response_id)
        if entry is None or entry.tenant != tenant:
            raise NotFoundError(f"There is no response '{response_id}'; it may be forgotten.", param=param)
        self._entries.move_to_end(response_id)
        return entry

    def drop(self, response_id: str) -> None:
        """Forget a response."""
        entry = self._entries.pop(response_id, None)
        if entry is not None:
            self._num_bytes -= entry.num_bytes
