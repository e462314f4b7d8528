"""The seam between the HTTP front end and whatever runs the model: one protocol, two values.

The server is written against ``EngineClient`` only; the real one lives in ``engine/client.py``, tests bring
their own. No torch, no HTTP here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from outrider.types import EngineInfo, EngineStats, Request, TokenEvent


class Health(msgspec.Struct, frozen=True):
    """For probes: ``ready`` (steps move while work exists), ``alive`` (ready, or able to become so), and why not.

    ``last_step_age_s`` is the time in seconds since the last finished step; ``reason`` is safe to show to clients.
    """

    ready: bool
    alive: bool
    reason: str = ""
    last_step_age_s: float = 0.0


class EngineClient(Protocol):
    """The front end's handle on the engine; used from one event loop."""

    info: EngineInfo
    stats: EngineStats
    num_restarts: int
    num_stalls: int

    def submit(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Hand over ``request``; its events follow until one carries ``finish_reason``.

        Raises at the call (not at the first iteration): ``EngineDeadError``, or ``OverloadedError`` when the
        queue is full. Events that pile up while the consumer is away arrive merged, in order.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stop working on a request. Idempotent, never blocks, unknown ids are ignored."""
        ...

    def health(self) -> Health:
        """The state of the engine now; cheap enough to call on every probe."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prompt beginnings; False when blocks in use prevent it."""
        ...
