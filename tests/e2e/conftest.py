"""Servers and oracles that the end-to-end tests share: each is started once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.oracle import Oracle
from tests.e2e.server_process import REPO, ServerProcess

MAX_MODEL_LEN = 2048


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data."""
    folder = Path(os.environ.get("OUTRIDER_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set OUTRIDER_SHARED")
    return folder


@pytest.fixture(scope="session")
def embedded() -> Iterator[ServerProcess]:
    """A server of the embedded model."""
    with ServerProcess(["--max-model-len", str(MAX_MODEL_LEN)]) as server:
        yield server


@pytest.fixture(scope="session")
def client(embedded: ServerProcess) -> Iterator[openai.OpenAI]:
    """The ``openai`` client of that server."""
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="EMPTY", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The same model in `transformers`."""
    return Oracle()
