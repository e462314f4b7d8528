"""What a start refuses before it costs anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from outrider.config import EngineConfig
from outrider.errors import ConfigError
from outrider.runner import setup

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[2].parent / "shared"))
FIXTURE = SHARED / "fixtures/llama4-tiny-a/bf16"


@pytest.mark.parametrize("ranks", [3, 64])
def test_a_split_that_does_not_divide_starts_no_rank(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against 64 processes that each find out, with a traceback, that 4 heads cannot be split so."""

    def started(*_: Any) -> None:
        raise AssertionError("rank processes were started")

    monkeypatch.setattr(setup, "Workers", started)
    config = EngineConfig(model=str(FIXTURE), tensor_parallel_size=ranks, device="cpu")
    with pytest.raises(ConfigError, match="tensor-parallel-size"):
        setup.build_engine(config, lambda *_: None)
