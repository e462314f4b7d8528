"""Where the reference checkpoints are, and one thread for torch: the models under test are tiny."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.models.references import References

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data."""
    folder = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set OUTRIDER_SHARED")
    return folder


@pytest.fixture(scope="session")
def references(shared: Path) -> References:
    """The tiny Llama 4 and what transformers computed with it."""
    return References(shared / "fixtures" / "llama4-tiny-a")
