"""Whether the engine moves: the rule behind the probes. Called by ``client`` for every message and once a second.

The engine speaks at least once a second while it is healthy, and its step counter grows while there is work. No
threads, no I/O; the clock is passed in, so that tests need not wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STALL_S = 8.0
"""Silence, or work without a finished step, for this long is a stall. With a tick a second, probes know by 10 s."""

RESTART_S = 300.0
"""A stall of this length does not end by itself: the engine is killed and started again."""

TICK_S = 1.0


class Liveness:
    """When the engine last spoke and last finished a step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps = -1
        self._owes_steps = False
        self.restart()

    def restart(self) -> None:
        """A new engine is ready: its clocks start now."""
        now = self._clock()
        self._last_message = self._last_step = self._last_tick = now
        self._owes_steps = False

    def message(self, steps: int, owes_steps: bool) -> None:
        """The engine spoke: ``steps`` finished so far, and whether there is work that a step could advance."""
        now = self._clock()
        self._last_message = now
        if steps != self._steps or not owes_steps or not self._owes_steps:
            self._last_step = now
        self._steps, self._owes_steps = steps, owes_steps

    def tick(self) -> None:
        """Called once a second. A late call means that this process was held up itself, unable to hear the engine."""
        now = self._clock()
        late = now - self._last_tick - TICK_S
        if late > TICK_S:
            self._last_message += late
            self._last_step += late
        self._last_tick = now

    @property
    def silence_s(self) -> float:
        """Seconds since the engine spoke."""
        return max(0.0, self._clock() - self._last_message)

    @property
    def step_age_s(self) -> float:
        """Seconds since a step finished, while there is work; 0 without work."""
        return max(0.0, self._clock() - self._last_step) if self._owes_steps else 0.0

    @property
    def stalled_s(self) -> float:
        """Length of the present stall, 0 while all is well."""
        longest = max(self.silence_s, self.step_age_s)
        return longest if longest > STALL_S else 0.0
