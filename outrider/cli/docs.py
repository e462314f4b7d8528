"""Writes ``docs/flags.md`` from the config dataclasses: ``python -m outrider.cli.docs [FILE]``.

Run by a contributor after changing an option; a test fails while the file is stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

from outrider.cli.help import flags_document


def main(argv: list[str]) -> int:
    """Write the document to ``argv[0]``, by default ``docs/flags.md`` of the working tree."""
    path = Path(argv[0]) if argv else Path("docs/flags.md")
    path.write_text(flags_document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
