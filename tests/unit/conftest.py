"""Shared by the tests of text: the real Llama 4 tokenizer, built once a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture(scope="session")
def llama4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real vocabulary, patterns and template; skips where they cannot be had."""
    pytest.importorskip("llama_models", reason="pip install llama-models brings the real vocabulary")
    script = SHARED / "tools" / "build_llama4_tokenizer.py"
    if not script.is_file():
        pytest.skip("the shared tools are not here")
    folder = tmp_path_factory.mktemp("llama4")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True, timeout=240)
    return folder
