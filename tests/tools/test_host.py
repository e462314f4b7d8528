"""``benchmarks.host``: its arithmetic, the engine on a clock, and (slow) a whole run over HTTP."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import host, host_engine
from outrider.types import RowInit, SamplingParams, SeqSlice, StepPlan


def test_summary_counts_the_window_only() -> None:
    """Guards the figures: tokens, CPU and steps outside the client's window do not count."""
    records = [[t / 10, t * 0.002, t * 0.003, 0.004 if t == 5 else 0.0, 100] for t in range(20)]
    measured = {
        "start": {"t": 0.25, "cpu_s": {"user": 1.0, "kernel": 2.0}},
        "end": {"t": 1.25, "cpu_s": {"user": 1.02, "kernel": 2.01}, "chunks": 750},
        "client": {"p50": 1.0},
    }
    found = host.summary(measured, records)
    assert found["tokens_per_s"] == 1000 and found["steps"] == 9
    assert found["front_end_us_per_token"] == 30.0 and found["front_end_us_per_chunk"] == 40.0
    assert found["of_which_us"] == {"user": 20.0, "kernel": 10.0}
    assert found["engine_thread_ms_per_step"] == 2.0 and found["engine_process_ms_per_step"] == 3.0
    assert found["late_ms"]["max"] == 4.0 and found["late_share"] == 0.004


def test_cpu_time_is_of_this_process() -> None:
    """Guards against wall time that is taken for CPU time."""
    before = host.cpu_s(os.getpid())
    time.sleep(0.3)
    rested = host.cpu_s(os.getpid())
    assert sum(rested.values()) - sum(before.values()) < 0.2
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert sum(host.cpu_s(os.getpid()).values()) - sum(rested.values()) > 0.2


def test_steps_of_the_clock_follow_each_other(tmp_path: Path) -> None:
    """Guards lateness: a step launched while the device works waits its turn, a late one shows as idle time."""
    device = host_engine.ClockDevice(host_engine.scout_layout(), 0.05, tmp_path / "records.json")
    init = RowInit(0, SamplingParams(max_tokens=9), 1, [])

    def plan(number: int) -> StepPlan:
        piece = SeqSlice(0, number, 1, [1], False, True, number)
        return StepPlan(number, [piece], [init] if not number else [])

    begin = time.monotonic()
    first, second = device.launch(plan(0)), device.launch(plan(1))
    assert len(first.wait().token_ids) == len(second.wait().token_ids) == 1
    assert time.monotonic() - begin >= 0.1
    time.sleep(0.02)
    device.launch(plan(2))
    device.shutdown()
    idle = [row[3] for row in json.loads((tmp_path / "records.json").read_text())]
    assert idle[1] == 0.0 and idle[2] >= 0.02


def test_cost_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the engine alone: every part is measured, and the parts make up the step."""
    monkeypatch.setattr(host_engine, "settle_heap", lambda: None)  # this process goes on with other tests
    costs = host_engine.step_costs(num_streams=4, num_steps=5, pause_s=0.0)
    parts = sum(costs[name]["least"] for name in ("schedule", "launch", "commit", "message"))
    assert 0 < parts <= costs["step"]["least"] + 0.005 and costs["step"]["least"] <= costs["step"]["median"]


@pytest.mark.slow
def test_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards the run over HTTP: both endpoints stream all tokens that the engine made."""
    out = tmp_path / "host.json"
    argv = ["host", "--streams", "8", "--step-ms", "50", "--window", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    host.main()
    result = json.loads(out.read_text())
    for name in host.PATHS:
        row = result[name]
        assert 60 < row["tokens_per_s"] <= 165 and row["front_end_us_per_token"] > 0
        assert row["steps"] > 15
