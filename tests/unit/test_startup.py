"""The start-up line: how old a process is, and what it says about its start."""

from __future__ import annotations

import subprocess
import sys
import time

from outrider.startup import breakdown, process_age_s


def test_age_counts_from_the_start_of_the_process() -> None:
    """Guards against a clock that starts at an import: what happened before it belongs to the launch as well."""
    code = "import time; time.sleep(0.5); from outrider.startup import process_age_s; print(process_age_s())"
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.45 < float(done.stdout) < time.monotonic() - begin + 0.1
    before = process_age_s()
    time.sleep(0.05)
    assert process_age_s() > before + 0.03


def test_breakdown() -> None:
    """Guards the line that operators read: every stage, and the whole only where it is known."""
    stages = {"imports": 3.14, "weights": 0.76}
    assert breakdown(stages) == "imports 3.1 s, weights 0.8 s"
    assert breakdown(stages, 9.46) == "imports 3.1 s, weights 0.8 s; ready 9.5 s after the launch"


def test_settled_heap_is_left_alone() -> None:
    """Guards steps against full collections: what exists when a process is ready is out of the collector's sight."""
    code = "import gc; from outrider.startup import settle_heap; settle_heap(); print(len(gc.get_objects()) < 500)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
