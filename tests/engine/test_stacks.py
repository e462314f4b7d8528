"""Asking a stalled engine for its stacks must not end what it is waiting for."""

from __future__ import annotations

import subprocess
import sys

from outrider.engine.client import _ask_for_stacks

ENGINE = """
import faulthandler, signal, subprocess, sys
faulthandler.register(signal.SIGUSR1, all_threads=True)
compiler = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print("ready", flush=True)
input()
compiler.communicate(b"\\n")
sys.exit(compiler.returncode)
"""


def test_the_stacks_of_an_engine_cost_its_children_nothing() -> None:
    """A signal to the whole session killed the kernel compiler that the engine was waiting for."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    _ask_for_stacks(process.pid)
    _, errors = process.communicate(b"\n", timeout=60)
    assert b"most recent call first" in errors
    assert process.returncode == 0, "the child was killed"
