"""Routing of normed rows in one kernel."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels._dispatch import arrival_counters
from outrider.kernels.router import route_rows_reference, route_rows_triton

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WIDE = torch.bfloat16 if GPU else torch.float32  # the interpreter cannot multiply bfloat16 blocks


@pytest.mark.parametrize("op", [route_rows_reference, route_rows_triton])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "size"), [(1, 16, 1, 512), (37, 5, 2, 200), (20, 128, 1, 1300)]
)
def test_rows_go_to_their_best_experts(op, tokens, experts, top_k, size):
    """Guards: a part of the depth left out or added twice, columns or experts behind the mask, stale counters."""
    x = torch.randn(tokens, size, device=DEVICE, dtype=WIDE)
    weight = torch.randn(experts, size, device=DEVICE, dtype=WIDE) * size**-0.5
    exact = x.double() @ weight.double().T
    for _ in range(2):
        ids, scores = op(x, weight, top_k)
        assert ids.dtype == torch.int32 and scores.dtype == torch.float32
        chosen = exact.gather(1, ids.long())
        best = exact.topk(top_k, dim=-1).values
        assert ((best - chosen) < 0.02).all(), "only ties in the rounded logits may be decided otherwise"
        assert torch.allclose(scores.double(), torch.sigmoid(chosen), atol=0.01)
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert not arrival_counters(DEVICE).any()


def test_a_row_is_routed_alike_in_any_company():
    """Guards: sums that follow the number of rows or their order: batches would change answers."""
    x = torch.randn(50, 640, device=DEVICE, dtype=WIDE)
    weight = torch.randn(16, 640, device=DEVICE, dtype=WIDE)
    ids, scores = route_rows_triton(x, weight, 1)
    for order in (torch.randperm(50), torch.arange(50).flip(0)[:7], torch.tensor([49])):
        some_ids, some_scores = route_rows_triton(x[order], weight, 1)
        assert torch.equal(some_ids, ids[order]) and torch.equal(some_scores, scores[order])
