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
    HELD = enum.auto()  # its prompt is computed ahead of its turn, all but the last token
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one request. ``in_flight`` counts launched plans that are not committed yet.

    ``prompt_len``, ``max_len`` (tokens at which nothing more is sampled) and ``end_token_ids`` are the request's own,
    kept here because every step of every sequence asks for them.
    """

    request: Request
    order: int
    num_groups: int
    prompt_len: int = field(init=False)
    max_len: int = field(init=False)
    end_token_ids: frozenset[int] = field(init=False)
    token_ids: list[int] = field(init=False)
    block_tables: list[list[int]] = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    prompt_blocks: int = 0  # blocks that its prompt takes
    demand: int = 0  # blocks that it was expected to hold at its end when it came
    paid: int = 0  # blocks times steps that its start was paid with
    row: int = -1
    num_computed: int = 0
    num_pending: int = 0
    in_flight: int = 0
    num_cached: int = 0
    queue_s: float = 0.0
    num_published: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.max_len = self.prompt_len + sampling.max_tokens
        self.end_token_ids = sampling.end_token_ids
        self.block_tables = [[] for _ in range(self.num_groups)]

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
        return len(self.token_ids) + self.num_pending - self.prompt_len

    @property
    def remaining(self) -> int:
        """Positions that still need computing before the next token can be sampled."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token is computed, so the next slice is a single token."""
        length = len(self.token_ids) + self.num_pending
        return self.num_computed == length - 1 and length > self.prompt_len
