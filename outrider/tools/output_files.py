"""Whether a result can be written, asked before the minutes of measuring that lead to it.

Called by the benchmarks and the evaluation with the values of their output flags.
"""

from __future__ import annotations

import os
from pathlib import Path

from outrider.errors import ConfigError


def check_writable(path: str | Path | None, flag: str) -> None:
    """``ConfigError`` naming ``flag`` unless a file at ``path`` can be written; its folders are made. None is fine."""
    if path is None:
        return
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}.") from error
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: Permission denied.")
