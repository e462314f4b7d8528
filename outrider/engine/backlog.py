"""The bound of the queue: how many prompt tokens wait for their first token, and whether one more request may.

Called by ``client`` on its event loop. Below ``max_num_seqs`` live requests nobody is refused, since they can all
run at once; beyond it the queue holds what the engine prefills in ``QUEUE_S`` seconds at its measured rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from outrider.errors import OverloadedError

QUEUE_S = 10.0
"""Seconds of prefill that may wait, unless ``--max-num-queued-tokens`` says how many tokens."""

FIRST_GUESS = 5000.0
"""Prompt tokens a second, until the first measurement."""

MIN_QUEUE_TOKENS = 2048
"""The measured queue is never shorter: requests that waited for others to end show too low a rate of prefill."""

_WINDOW_S = 1.0
_WEIGHT = 0.3
_MAX_RETRY_AFTER_S = 60.0


class Backlog:
    """Prompt tokens of requests that have no token yet, and the rate at which they are worked off."""

    def __init__(self, max_tokens: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_tokens = max_tokens
        self._clock = clock
        self._waiting: dict[str, int] = {}
        self.num_tokens = 0
        self.rate = FIRST_GUESS
        self._is_measured = False
        self._window: tuple[float, int] | None = None

    @property
    def limit(self) -> int:
        """Prompt tokens that may wait."""
        if self._max_tokens is not None:
            return self._max_tokens
        return max(int(self.rate * QUEUE_S), MIN_QUEUE_TOKENS)

    def check(self, num_tokens: int, num_live: int, max_num_seqs: int) -> None:
        """``OverloadedError`` when ``num_tokens`` more must not wait; ``num_live`` requests are unfinished."""
        excess = self.num_tokens + num_tokens - self.limit
        if num_live < max_num_seqs or not self._waiting or excess <= 0:
            return
        retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, math.ceil(excess / self.rate)))
        raise OverloadedError(
            f"The queue is full: {self.num_tokens} prompt tokens wait and {self.limit} may. "
            f"Try again in {retry_after_s:.0f} s.",
            retry_after_s=retry_after_s,
        )

    def add(self, request_id: str, num_tokens: int) -> None:
        """A request waits for its first token."""
        self._waiting[request_id] = num_tokens
        self.num_tokens += num_tokens

    def remove(self, request_id: str) -> None:
        """Its first token is here, or it ended without one. Unknown ids are ignored."""
        self.num_tokens -= self._waiting.pop(request_id, 0)

    def observe(self, prompt_tokens: int) -> None:
        """The engine's counter of prefilled tokens; a window counts when somebody waited all through it."""
        now = self._clock()
        if not self._waiting:
            self._window = None
            return
        if self._window is None:
            self._window = now, prompt_tokens
            return
        start, before = self._window
        if now - start < _WINDOW_S:
            return
        rate = (prompt_tokens - before) / (now - start)
        if rate > 0:
            self.rate = rate if not self._is_measured else self.rate + _WEIGHT * (rate - self.rate)
            self._is_measured = True
        self._window = now, prompt_tokens
