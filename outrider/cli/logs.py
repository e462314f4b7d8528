"""``setup_logging`` under the name by which commands know it; the format is in ``outrider/logs.py``."""

from outrider.logs import setup_logging

__all__ = ["setup_logging"]
