"""Start-up time by stage. Made by ``setup`` or ``worker``, marked by ``rank``, shown in the start-up line."""

from __future__ import annotations

import time


class Ledger:
    """Seconds of every stage so far; the first stage begins when the ledger is made."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """The stage ends here."""
        now = time.perf_counter()
        self.stages[stage] = round(now - self._last, 3)
        self._last = now
