"""``quant.matrix``: products of any number of rows, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.nn.functional as F

from outrider.quant.matrix import ROW_COUNTS, Matrix, padded_rows

GROWTH = """
from pathlib import Path
import torch
from outrider.quant.matrix import Matrix

def resident_mb():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024

matrix = Matrix(torch.randn(256, 128))
matrix.prepare()
with torch.inference_mode():
    matrix(torch.randn(512, 128))
    before = resident_mb()
    for rows in range(1, 400):
        matrix(torch.randn(rows, 128))
print(resident_mb() - before)
"""


def test_any_number_of_rows() -> None:
    """Guards against padding that shows: rows lost, rows added, or another row's product."""
    matrix = Matrix(torch.randn(48, 32, generator=torch.Generator().manual_seed(1)))
    weight = matrix.weight.clone()
    matrix.prepare()
    for rows in (0, 1, 3, 16, 17, 100, 511, 512, 513, 1030):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(matrix(x), F.linear(x, weight))
    assert [padded_rows(rows) for rows in (1, 3, 512, 513, 1024, 1025)] == [1, 4, 512, 1024, 1024, 1536]
    assert all(padded_rows(rows) == rows for rows in ROW_COUNTS)


def test_memory_does_not_follow_the_rows_seen() -> None:
    """Guards against a cache entry of the product's library for every number of rows: 0.65 MB each, without an end."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60, done.stdout
