"""Fixtures of the tools' tests: fake OpenAI servers, parsed flags, the shared reference folder."""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI

from outrider.tools import bench_serve

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def shared() -> Path:
    """The folder with the recipe and reference data."""
    folder = Path(os.environ.get("OUTRIDER_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set OUTRIDER_SHARED")
    return folder


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeOpenAI]]:
    """Starts fake servers and stops them after the test."""
    servers: list[FakeOpenAI] = []

    def start(**options: object) -> FakeOpenAI:
        servers.append(FakeOpenAI(**options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def serve_args() -> Callable[..., argparse.Namespace]:
    """``bench serve`` flags, parsed."""

    def parse(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        bench_serve.add_arguments(parser)
        return parser.parse_args(list(words))

    return parse
