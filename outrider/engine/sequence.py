"""One sampled continuation as the scheduler sees it: counters, not phases.

Owned by the scheduler alone; never leaves the engine process. Ranges of positions of a running sequence:

    0 ........ num_computed ........ len(token_ids) .... length
    |  k/v exist or are     |  known ids still to  | ids sampled by launched steps that
    |  being computed       |  compute             | the host has not read (``num_pending``)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outrider.types import Request, TokenLogprobs

if TYPE_CHECKING:
    from outrider.engine.grammar import Grammar


class SequenceStatus(enum.Enum):
    """Where the scheduler keeps the sequence."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request. ``in_flight`` counts launched plans that are not committed yet."""

    request: Request
    order: int
    num_groups: int
    token_ids: list[int] = field(init=False)
    block_tables: list[list[int]] = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    row: int = -1
    num_computed: int = 0
    num_pending: int = 0
    in_flight: int = 0
    num_cached: int = 0
    num_published: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.block_tables = [[] for _ in range(self.num_groups)]

    @property
    def prompt_len(self) -> int:
        """Tokens the client sent."""
        return len(self.request.prompt_token_ids)

    @property
    def length(self) -> int:
        """Tokens that exist, the unread ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_read(self) -> int:
        """Generated tokens that the host has read."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_outputs(self) -> int:
        """Generated tokens, the unread ones included."""
        return self.length - self.prompt_len

    @property
    def remaining(self) -> int:
        """Positions that still need computing before the next token can be sampled."""
        return self.length - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token is computed, so the next slice is a single token."""
        return self.remaining == 1 and self.num_outputs > 0

    @property
    def is_exhausted(self) -> bool:
        """Whether enough tokens are generated or on their way; nothing more is to be planned."""
        return self.num_outputs >= self.request.sampling.max_tokens
