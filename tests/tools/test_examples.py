"""The example programs: each runs as documented; stream.py against the fake server, word for word."""

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_compile_and_say_how_to_run(file, tmp_path):
    """Guards: an example that no longer parses, or does not say what to type."""
    py_compile.compile(str(file), cfile=str(tmp_path / "x.pyc"), doraise=True)
    assert f"python examples/{file.name}" in file.read_text().split('"""')[1]


def test_stream_prints_both_answers(fake):
    """Guards: chunks without choices (usage) that break the loop; text lost."""
    server = fake(ttft_s=0.0, itl_s=0.0)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "stream.py"), f"{server.url}/v1"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENAI_API_KEY": "EMPTY"},
    )
    assert done.returncode == 0, done.stderr
    first, second, usage = done.stdout.splitlines()
    assert first.endswith(" w19") and second.endswith(" w59") and usage == "[7 tokens in, 60 out]"
