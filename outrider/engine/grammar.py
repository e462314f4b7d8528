"""Structured output: grammars compiled off the engine's loop, token masks while the device works.

Called by ``engine`` (compile) and ``scheduler`` (mask, advance). Wraps ``llguidance``; knows no HTTP.
"""

from __future__ import annotations

from typing import Protocol

from outrider.types import Request


class Grammar(Protocol):
    """The state of one constrained sequence."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        ...

    def mask(self) -> bytes:
        """Packed little-endian bitmask over the vocabulary (bit set: token allowed now)."""
        ...

    def advance(self, token_id: int) -> None:
        """The token was sampled."""
        ...


class GrammarCompiler(Protocol):
    """Builds grammars in the background, with bounds on time and size."""

    @property
    def num_pending(self) -> int:
        """Requests whose grammar is not built yet."""
        ...

    def start(self, request: Request) -> None:
        """Begin to build the grammar of a request."""
        ...

    def cancel(self, request_id: str) -> None:
        """Forget a request that is still compiling."""
        ...

    def collect(self) -> list[tuple[Request, Grammar | None, str | None]]:
        """Finished builds: ``(request, grammar, None)`` or ``(request, None, error sentence)``."""
        ...
