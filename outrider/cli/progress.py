"""How far the start-up has come: a bar in GB on a terminal, a log line every few seconds elsewhere.

``cli/serve.py`` hands an instance to the engine client, which calls it with what the engine process reports.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

LINE_INTERVAL_S = 5.0

logger = logging.getLogger(__name__)


class StartupProgress:
    """A callback ``(stage, done, total)`` in bytes; a context manager that leaves the terminal clean."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._last_line_s = 0.0
        if sys.stderr.isatty():
            self._bar = _terminal_bar()

    def __enter__(self) -> StartupProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes of ``stage`` are through."""
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
            return
        now = time.monotonic()
        if done >= total or now - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = now
            logger.info("%s: %.2f of %.2f GB", stage, done / 1e9, total / 1e9)


def _terminal_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
