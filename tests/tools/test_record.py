"""``benchmarks.record``: what a results file says of its run, and how a benchmark ends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import determinism, record
from benchmarks.kernels.common import Report
from outrider.errors import ConfigError, EngineError


def test_about_says_what_was_typed(monkeypatch):
    """Guards the head of every results file: nothing is missing, and the command can be pasted into a shell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    head = record.about("benchmarks.sweep", ["--model", "a folder"])
    assert set(record.ABOUT) <= set(head) and head["torch"] == torch.__version__
    assert head["command"] == "python -m benchmarks.sweep --model 'a folder'"
    assert head["device"] == record.cpu() and head["device"].endswith(" cores")
    assert record.about("benchmarks.policies", [], device="none")["device"] == "none"


def test_a_row_without_a_time_is_json(tmp_path, capsys):
    """Guards against NaN for a variant that did not run, and against one that slips into a file elsewhere."""
    report = SimpleNamespace(rows=[], path=tmp_path / "new" / "rows.json", head={"benchmark": "x"})
    report._add = lambda *args, **numbers: Report._add(report, *args, **numbers)
    Report.fail(report, "case", "variant", "does not fit")
    Report.write(report)
    row = {"case": "case", "variant": "variant", "us": None, "error": "does not fit"}
    assert json.loads(report.path.read_text()) == {"benchmark": "x", "rows": [row]}
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(ValueError):
        record.as_json({"us": float("nan")})


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("no such folder."), 2), (EngineError("it died."), 1)]
)
def test_deliberate_errors_are_one_sentence(error, code, capsys):
    """Guards against a traceback for a wrong flag."""

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        record.end_with(main)
    assert ended.value.code == code and capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(SystemExit) as ended:
        record.end_with(lambda: None)
    assert ended.value.code is None


def test_a_gpu_that_is_not_there(monkeypatch):
    """Guards against a traceback from torch where a GPU was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda needs a CUDA device"):
        determinism.main(["--device", "cuda"])
