"""Rows of an embedding table."""

from __future__ import annotations

import pytest
import torch

from outrider.kernels.embedding import embedding, embedding_reference, embedding_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("row_size", [64, 200])
def test_rows_are_copied(num_tokens, row_size):
    """Guards: a row of another token, columns behind the mask."""
    table = torch.randn(50, row_size, device=DEVICE)
    ids = torch.randint(50, (num_tokens,), device=DEVICE)
    out = embedding_triton(ids, table)
    assert torch.equal(out, table[ids])
    assert torch.equal(out, embedding_reference(ids, table))


@pytest.mark.skipif(DEVICE == "cpu", reason="host memory is read over the bus by a GPU only")
def test_a_table_in_host_memory_is_read_within_a_graph():
    """Guards: a graph that keeps rows instead of reading them, and a pointer that the device cannot follow."""
    table = torch.empty(3000, 5120, dtype=torch.bfloat16, pin_memory=True).normal_()
    ids = torch.zeros(700, dtype=torch.int64, device=DEVICE)
    embedding(ids, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embedding(ids, table)
    for _ in range(3):
        ids.copy_(torch.randint(3000, (700,)))
        graph.replay()
        assert torch.equal(out.cpu(), table[ids.cpu()])
