"""The one log format of all processes: ``(Name pid=N) INFO 11-23 15:04:05 [file.py:7] text``.

A leaf module: called once by each process as it starts; ``uvicorn`` logs through the same handler. It never
opens a file and never sends anything anywhere.
"""

from __future__ import annotations

import logging
import os

LEVELS = ("critical", "error", "warning", "info", "debug")


def level_from_environment() -> str:
    """``$OUTRIDER_LOGGING_LEVEL``, else ``$VLLM_LOGGING_LEVEL``, else (also for unknown words) ``info``."""
    name = os.environ.get("OUTRIDER_LOGGING_LEVEL") or os.environ.get("VLLM_LOGGING_LEVEL") or "info"
    return name.lower() if name.lower() in LEVELS else "info"


def setup_logging(process: str, level: str | None = None) -> None:
    """Send all log records of this process to stderr, each line opened by ``(process pid=N)``."""
    handler = logging.StreamHandler()
    prefix = f"({process} pid={os.getpid()})"
    line = f"{prefix} %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
    handler.setFormatter(logging.Formatter(line, datefmt="%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel((level or level_from_environment()).upper())
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
