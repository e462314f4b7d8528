"""One server for the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reliability.server import SMALL, TINY, Server

if not TINY.is_dir():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A small server on the tiny Llama 4; no test may hurt it."""
    with Server(*SMALL) as running:
        pid = running.engine_pid
        yield running
        assert running.engine_pid == pid, "a test that shares the server ended its engine"
        assert running.metric("engine_restarts_total") == 0
