"""``--deterministic``: the same bits whatever runs beside a request."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from outrider.config import EngineConfig
from outrider.errors import ConfigError
from outrider.models.config_hf import load_model_config
from outrider.models.gguf import embedded_model_path
from outrider.runner import resolve
from tests.reliability.server import ROOT, TINY, scaled


def outcome(model: str, count: int, deterministic: str) -> Any:
    """What ``determinism.py`` printed."""
    command = [sys.executable, "-m", "tests.reliability.determinism", model, str(count), deterministic]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("model", "count"),
    [(str(TINY), scaled(60, 1000)), (str(embedded_model_path()), scaled(8, 100))],
    ids=["tiny Llama 4", "SmolLM2"],
)
def test_company_changes_no_bit(model: str, count: int) -> None:
    """Guards against sums whose order depends on the batch, the chunk, a cached prefix or a preemption."""
    result = outcome(model, count, "yes")
    assert set(result["differing"].values()) == {0}, result


def test_the_test_can_fail() -> None:
    """Guards against a comparison that is blind: without the flag company does change bits."""
    result = outcome(str(TINY), 60, "no")
    assert result["differing"]["in company"] > 0, result


def test_refused_where_it_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a promise on a GPU that nobody has proved."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--deterministic works on a CPU only"):
        resolve.resolve(EngineConfig(deterministic=True), load_model_config(TINY))
