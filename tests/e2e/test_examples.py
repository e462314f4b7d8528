"""The example programs against real models, started as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server_process import REPO, ServerProcess


@pytest.fixture(scope="module")
def seeing(shared: Path) -> Iterator[ServerProcess]:
    """A server of the tiny Llama 4, which has a vision tower."""
    folder = shared / "fixtures" / "llama4-tiny-a" / "bf16"
    with ServerProcess([str(folder), "--max-model-len", "1024", "--served-model-name", "tiny"]) as server:
        yield server


def run_example(name: str, *words: str) -> str:
    """What ``python examples/NAME ...`` prints."""
    command = [sys.executable, f"examples/{name}", *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stream(embedded: ServerProcess) -> None:
    """Guards: the first program that a newcomer runs; text of both answers, and the counts at the end."""
    printed = run_example("stream.py", f"{embedded.url}/v1")
    assert "[" in printed and "tokens in," in printed.splitlines()[-1]
    assert len(printed.splitlines()[0]) > 20


def test_tools(embedded: ServerProcess) -> None:
    """Guards: a forced tool call of a real model has valid arguments, and its result goes back into the chat."""
    printed = run_example("tools.py", f"{embedded.url}/v1")
    assert printed.startswith("get_weather('") and len(printed.splitlines()) >= 2


def test_images(seeing: ServerProcess, shared: Path) -> None:
    """Guards: a picture as a data: URL reaches the vision tower; it costs prompt tokens and brings an answer."""
    picture = shared / "fixtures" / "llama4-tiny-a" / "image1.png"
    before = seeing.metric("request_prompt_tokens_sum")
    assert run_example("images.py", str(picture), f"{seeing.url}/v1").strip()
    question = {"role": "user", "content": "What does the picture show?"}
    with_image = seeing.metric("request_prompt_tokens_sum") - before
    answer = seeing.post("/v1/chat/completions", messages=[question], max_tokens=1).json()
    # Four tiles and the whole picture, four tokens each, and the separators between them.
    assert with_image - answer["usage"]["prompt_tokens"] >= 5 * 4
