"""``outrider bench kernels``: its table, and what becomes of a suite that cannot run."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.tools import bench_kernels


def _run(*argv: str) -> int:
    parser = ArgumentParser()
    bench_kernels.add_arguments(parser)
    return bench_kernels.run(parser.parse_args(argv))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The machine under test has a GPU, unless a test says otherwise."""
    monkeypatch.setattr(bench_kernels, "has_cuda", lambda: True)


def _fake_tree(folder: Path, body: str) -> Path:
    suites = folder / "benchmarks" / "kernels"
    suites.mkdir(parents=True)
    for package in (suites.parent, suites):
        (package / "__init__.py").touch()
    (suites / "gemm.py").write_text(body)
    return folder


def test_rows_of_a_suite_reach_table_and_file(tmp_path, monkeypatch, capsys):
    """Guards: a wrong kernel that ends with exit code 0, rows lost between the processes."""
    rows = [
        {
            "case": "fp8 qkv T=1",
            "variant": "table",
            "us": 12.5,
            "gb_per_s": 2936,
            "floor_us": 8.9,
            "percent": 71,
        },
        {
            "case": "fp8 qkv T=8192",
            "variant": "cublas",
            "us": 480.0,
            "tflop_per_s": 1252,
            "floor_us": 445.0,
            "percent": 93,
        },
        {"case": "fp8 o T=1", "variant": "table", "us": None, "error": "relative error 0.3"},
    ]
    body = f"import json, sys\nopen(sys.argv[2], 'w').write(json.dumps({{'rows': {rows!r}}}))"
    monkeypatch.setattr(bench_kernels, "find_suites", lambda: _fake_tree(tmp_path, body))
    out = tmp_path / "out" / "rows.json"
    assert _run("--suite", "gemm", "--json", str(out)) == 1
    table = capsys.readouterr().out
    lines = [line.split() for line in table.splitlines() if line.startswith("fp8")]
    assert lines[0][-6:] == ["12.50", "2936", "GB/s", "8.90", "71", "%"]
    assert lines[1][-6:] == ["480.00", "1252", "TFLOP/s", "445.00", "93", "%"]
    assert "relative error 0.3" in table
    result = json.loads(out.read_text())
    assert result["command"] == f"outrider bench kernels --suite gemm --json {out}"
    assert [suite["rows"] for suite in result["suites"]] == [rows]


def test_without_a_gpu_it_refuses_at_once(monkeypatch):
    """Guards against seven suites that each fail with their own traceback."""
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(bench_kernels, "run_suite", lambda *_: pytest.fail("a suite was started"))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        _run("--suite", "gemm")


def test_suite_that_ends_early_is_a_row(tmp_path, monkeypatch, capsys):
    """Guards: one broken suite that hides the results of the others, or passes for a success."""
    body = "import sys\nsys.exit('this benchmark needs a CUDA device')"
    monkeypatch.setattr(bench_kernels, "find_suites", lambda: _fake_tree(tmp_path, body))
    assert _run("--suite", "gemm") == 1
    assert "this benchmark needs a CUDA device" in capsys.readouterr().out


def test_every_suite_exists():
    """Guards: a suite renamed in one place only."""
    root = bench_kernels.find_suites() / "benchmarks" / "kernels"
    found = {path.stem for path in root.glob("*.py")} - {"__init__", "common"}
    assert found == set(bench_kernels.SUITES)


def test_unknown_suite_is_refused(capsys):
    """Guards: a typo that measures nothing and succeeds."""
    with pytest.raises(SystemExit):
        _run("--suite", "gem")
    assert "invalid choice" in capsys.readouterr().err
