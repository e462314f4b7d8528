"""Sampling against the distribution written out in float64 with a sort."""

from __future__ import annotations

import exact_casts  # noqa: F401
import pytest
import torch

from outrider.kernels.sampling import SamplingRows, sample_reference, sample_triton, top_logprobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [sample_reference, sample_triton]
INF = float("inf")


def rows(*settings):
    """SamplingRows of ``(temperature, top_p, top_k, min_p, uniform)`` tuples."""
    columns = list(zip(*settings, strict=True))
    dtypes = (torch.float32, torch.float32, torch.int32, torch.float32, torch.float32)
    return SamplingRows(
        *(torch.tensor(c, dtype=d, device=DEVICE) for c, d in zip(columns, dtypes, strict=True))
    )


def kept_distribution(logits, temperature, top_p, top_k, min_p):
    """Float64 probabilities of the kept tokens, by sorting; written token by token."""
    probs = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    keep = order if top_k <= 0 else [i for i in order if probs[i] >= probs[order[min(top_k, len(order)) - 1]]]
    mass, total, nucleus = 0.0, float(probs[keep].sum()), []
    for i in keep:
        if mass >= top_p * total and probs[i] < probs[nucleus[-1]]:
            break
        nucleus.append(i)
        mass += float(probs[i])
    final = [i for i in nucleus if probs[i] >= min_p * float(probs.max())]
    out = torch.zeros_like(probs)
    out[final] = probs[final]
    return out / out.sum()


SETTINGS = [
    (1.0, 1.0, 0, 0.0),
    (0.7, 0.9, 0, 0.0),
    (1.3, 1.0, 5, 0.0),
    (1.0, 0.6, 40, 0.0),
    (1.0, 1.0, 0, 0.1),
    (2.0, 0.95, 100, 0.02),
    (1.0, 0.01, 0, 0.0),
    (0.5, 1.0, 10**6, 1.0),
]


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("vocab", [37, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_invert_the_kept_distribution(op, vocab, dtype):
    """Guards: the order of the filters, an off-by-one nucleus, temperature applied twice, a wrong id order."""
    uniforms = [float(u) for u in torch.rand(3)]
    settings = [(*s, u) for s in SETTINGS for u in uniforms]
    logits = (torch.randn(len(settings), vocab) * 2).to(dtype)
    ids = op(logits.to(DEVICE), rows(*settings)).tolist()
    for row, (setting, token) in enumerate(zip(settings, ids, strict=True)):
        probs = kept_distribution(logits[row].float(), *setting[:4])
        assert probs[token] > 0, setting
        below = float(probs[:token].sum())
        assert below - 1e-5 <= setting[4] <= below + float(probs[token]) + 1e-5, setting


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("all_greedy", [True, False])
def test_greedy_takes_the_lowest_of_equals(op, all_greedy):
    """Guards: ties across the tiles of a row, top_k 1 drawn at random, greedy ids that depend on the flag."""
    logits = torch.randn(3, 9001)
    logits[0, [17, 5000, 9000]] = 50.0
    logits[1, [8999, 9000]] = 50.0
    settings = [(0.0, 1.0, 0, 0.0, 0.99), (0.0, 0.5, 3, 0.1, 0.5), (1.0, 1.0, 1, 0.0, 0.5)]
    expected = [17, 8999, int(logits[2].argmax())]
    assert op(logits.to(DEVICE), rows(*settings), all_greedy).tolist() == expected


@pytest.mark.parametrize("op", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows_say_so(op, temperature):
    """Guards: a NaN that a maximum ignores, +inf, an empty mask; a masked row (-inf) is not broken."""
    logits = torch.randn(5, 5000)
    logits[0, 4999] = float("nan")
    logits[1, 3] = INF
    logits[2, :] = -INF
    logits[3, :] = -INF
    logits[3, 4321] = -60.0
    ids = op(logits.to(DEVICE), rows(*[(temperature, 0.9, 50, 0.0, 0.999)] * 5)).tolist()
    assert ids[:4] == [-1, -1, -1, 4321]
    assert ids[4] >= 0


@pytest.mark.parametrize("op", PATHS)
def test_equal_logits_all_stay(op):
    """Guards: bisection between equal values must end, and top_k among equals keeps them all."""
    logits = torch.full((2, 700), -3.0)
    logits[:, [5, 300, 650]] = 1.5
    settings = [(1.0, 1.0, 2, 0.0, 0.9), (1.0, 0.2, 0, 0.0, 0.5)]
    assert op(logits.to(DEVICE), rows(*settings)).tolist() == [650, 300]


def test_top_logprobs():
    """Guards: a rank that counts from 0, log-probabilities after temperature, ids out of order."""
    logits = torch.randn(4, 333).bfloat16().to(DEVICE)
    ids = torch.tensor([0, 332, 7, -1], device=DEVICE)
    got = top_logprobs(logits, ids, 5)
    exact = torch.log_softmax(logits.double(), -1)
    for row, token in enumerate(ids.clamp(min=0).tolist()):
        assert float(got.logprob[row]) == pytest.approx(float(exact[row, token]), abs=1e-5)
        assert int(got.rank[row]) == 1 + int((logits[row] > logits[row, token]).sum())
        assert torch.allclose(exact[row, got.top_ids[row]], got.top_logprobs[row].double(), atol=1e-5)
        assert torch.equal(got.top_logprobs[row], got.top_logprobs[row].sort(descending=True).values)
        assert float(got.top_logprobs[row, 0]) == pytest.approx(float(exact[row].max()), abs=1e-5)
