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
    """What ``benchmarks/determinism.py`` measures in the mode or without it."""
    command = [sys.executable, "-m", "benchmarks.determinism", "--worker", deterministic, "--device", "cpu"]
    command += ["--model", model, "--prompts", str(count)]
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
    """Guards against a promise on a GPU for what does not go through the invariant kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = load_model_config(TINY)
    fields = {"deterministic": True, "language_model_only": True}
    resolve.resolve(EngineConfig(**fields), model)
    with pytest.raises(ConfigError, match="does not cover images"):
        resolve.resolve(EngineConfig(deterministic=True), model)
    with pytest.raises(ConfigError, match="works on one GPU"):
        resolve.resolve(EngineConfig(**fields, tensor_parallel_size=2), model)
    with pytest.raises(ConfigError, match="does not cover NVFP4"):
        resolve.resolve(EngineConfig(**fields), load_model_config(TINY.with_name("nvfp4")))
