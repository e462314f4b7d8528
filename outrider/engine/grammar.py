"""The seam between the scheduler and whatever constrains text: the state of one sequence, and its builder.

Called by ``engine`` (compile) and ``scheduler`` (mask, advance). The implementation over ``llguidance`` is
``engine/guidance.py``; tests bring their own. Knows no HTTP and no text.
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

    @property
    def is_ready(self) -> bool:
        """Whether ``mask`` would return (almost) at once; a sequence whose mask is late skips a step."""
        ...

    @property
    def error(self) -> str | None:
        """Why this grammar cannot go on (a limit was reached), as a sentence for the client; None while it can."""
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

    def close(self) -> None:
        """End what runs in the background."""
        ...
