"""``outrider bench kernels``: which scripts it runs and how it fails without a GPU, a checkout or a right name."""

import argparse
import ast
import subprocess
import sys

import pytest

from outrider.errors import ConfigError
from outrider.tools import bench_kernels


def parse(*words):
    parser = argparse.ArgumentParser()
    bench_kernels.add_arguments(parser)
    return parser.parse_args(list(words))


def test_each_script_is_run_with_its_file(monkeypatch, tmp_path):
    """Guards: a script left out, flags that do not reach it, a failure that is forgotten."""
    commands = []

    def fake(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=command[2].endswith("gemm"))

    monkeypatch.setattr(subprocess, "run", fake)
    assert bench_kernels.run(parse("--quick", "--output-dir", str(tmp_path))) == 1
    assert [c[:2] for c in commands] == [[sys.executable, "-m"]] * len(commands)
    assert {"benchmarks.kernels.gemm", "benchmarks.kernels.attention"} <= {c[2] for c in commands}
    assert all(c[3] == "--quick" and c[5].endswith(".json") for c in commands)
    commands.clear()
    assert bench_kernels.run(parse("attention")) == 0 and len(commands) == 1


def test_every_script_is_a_program():
    """Guards: a module of helpers that the command would run as a benchmark."""
    for name in bench_kernels.scripts():
        tree = ast.parse((bench_kernels.REPO / "benchmarks" / "kernels" / f"{name}.py").read_text())
        assert any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body), (
            name
        )


def test_refusals(monkeypatch, tmp_path):
    """Guards: a traceback for a typing error or for an installed package."""
    with pytest.raises(ConfigError, match="attention"):
        bench_kernels.run(parse("atention"))
    monkeypatch.setattr(bench_kernels, "REPO", tmp_path)
    with pytest.raises(ConfigError, match="checkout"):
        bench_kernels.run(parse())
