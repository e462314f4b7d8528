"""What a start refuses before it costs anything."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.config import EngineConfig
from outrider.errors import ConfigError
from outrider.models.config_hf import load_model_config
from outrider.runner import resolve, setup

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[2].parent / "shared"))
FIXTURE = SHARED / "fixtures/llama4-tiny-a/bf16"


@pytest.mark.parametrize(("kind", "ranks"), [("tensor", 3), ("tensor", 64), ("pipeline", 64)])
def test_a_split_that_does_not_divide_starts_no_rank(
    kind: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against 64 processes that each find out, with a traceback, that the model cannot be split so."""

    def started(*_: Any) -> None:
        raise AssertionError("rank processes were started")

    monkeypatch.setattr(setup, "Workers", started)
    split: dict[str, Any] = {f"{kind}_parallel_size": ranks}
    config = EngineConfig(model=str(FIXTURE), device="cpu", **split)
    with pytest.raises(ConfigError, match=f"{kind}-parallel-size"):
        setup.build_engine(config, lambda *_: None)


@pytest.mark.parametrize(("kv_dtype", "budget"), [("fp8", "100k"), ("float32", "100k"), ("float32", "1")])
def test_a_cache_too_small_names_only_settings_that_help(kv_dtype: str, budget: str) -> None:
    """Guards against advice that is in force already (fp8) or cannot be followed (a length of 0)."""
    size = int(budget.replace("k", "000"))
    config = EngineConfig(
        model=str(FIXTURE),
        device="cpu",
        max_model_len=4096,
        kv_cache_dtype=kv_dtype,
        kv_cache_memory_bytes=size,
    )
    with pytest.raises(ConfigError, match="One request of --max-model-len 4096 needs") as caught:
        setup.build_engine(config, lambda *_: None)
    message = str(caught.value)
    assert ("--kv-cache-dtype fp8" in message) == (kv_dtype != "fp8")
    assert "0 GiB" not in message.replace(".0", "") and "--max-model-len 0" not in message


def test_a_start_imports_no_compiler() -> None:
    """Guards seconds of every start: nothing on the way to an engine loads torch's compiler or ``transformers``."""
    code = f"""
import sys
from outrider.config import EngineConfig
from outrider.runner.setup import build_engine
config = EngineConfig(model={str(FIXTURE)!r}, tokenizer={str(FIXTURE)!r}, device="cpu", max_model_len=64)
_, info = build_engine(config, lambda *_: None)
heavy = {{"transformers", "sympy", "torch._dynamo", "torch._inductor", "fastapi"}}
print(",".join(sorted(heavy & set(sys.modules))) or "none of them")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none of them"


def test_more_query_heads_than_a_kernel_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against attention over the first sixteen heads of a group, without a word."""
    model = load_model_config(FIXTURE)
    wide = dataclasses.replace(model, num_heads=17 * model.num_kv_heads)
    resolve.resolve(EngineConfig(device="cpu"), wide)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resolve.resolve(EngineConfig(), model)
    with pytest.raises(ConfigError, match="use --device cpu"):
        resolve.resolve(EngineConfig(), wide)
