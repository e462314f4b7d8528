"""``python -m outrider`` and the ``outrider`` program: hands the command line to ``cli/commands.py``."""

from __future__ import annotations

import sys

from outrider.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
