"""Choosing token ids from logits on the device, and the log-probabilities that are reported beside them.

Called by the runner once per step with the rows that sample. No step here waits for the host, and nothing is
sorted: top-k, top-p and min-p are thresholds on the logit, found by bisection. Penalties, biases and grammar
masks have already been applied to the logits (a masked token is -inf).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SamplingRows(NamedTuple):
    """Per-row sampling parameters, each ``[N]`` on the device of the logits.

    ``temperature``, ``top_p``, ``min_p``, ``uniform`` float32; ``top_k`` int32. ``temperature`` 0 is greedy;
    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``uniform`` lies in (0, 1).
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


def sample(logits: torch.Tensor, rows: SamplingRows, all_greedy: bool = False) -> torch.Tensor:
    """One id per row of ``logits [N, V]`` as int64 ``[N]``; -1 where a row has a NaN, a +inf or only -inf.

    Greedy rows (temperature 0, or top_k 1) take the highest logit, the lowest id among equals. The others draw
    from ``softmax(logits / temperature)`` restricted to the tokens that pass, in this order, top_k (at least the
    k-th probability; equals stay), top_p (the most probable tokens whose renormalised mass reaches top_p; equals
    stay) and min_p (at least min_p times the highest probability), by inverting the cumulative distribution in
    id order at ``uniform``. ``all_greedy`` is a promise of the host that skips the rest.
    """
    if logits.is_cuda:
        return sample_triton(logits, rows, all_greedy)
    return sample_reference(logits, rows, all_greedy)


def sample_reference(logits: torch.Tensor, rows: SamplingRows, all_greedy: bool = False) -> torch.Tensor:
    """The contract of ``sample`` in plain torch: the CPU path and the test oracle."""
    best, greedy = logits.max(dim=-1)
    if not all_greedy:
        is_greedy = (rows.temperature == 0) | (rows.top_k == 1)
        greedy = torch.where(is_greedy, greedy, _draw(logits, rows))
    return torch.where(torch.isfinite(best), greedy, -1)


def _draw(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The stochastic rows' ids; sorting is fine where vocabularies meet a CPU."""
    vocab = logits.shape[-1]
    temperature = torch.where(rows.temperature == 0, 1.0, rows.temperature)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    ordered = probs.sort(dim=-1, descending=True).values
    k = torch.where(rows.top_k <= 0, vocab, rows.top_k.clamp(max=vocab)).long()
    threshold = ordered.gather(1, k[:, None] - 1)
    mass = ordered.masked_fill(ordered < threshold, 0).cumsum(dim=-1)
    # The first place where the kept mass reaches top_p; a sum that rounding leaves short keeps everything.
    place = (mass < rows.top_p[:, None] * mass[:, -1:]).sum(dim=-1, keepdim=True).clamp_(max=vocab - 1)
    threshold = torch.maximum(threshold, torch.where(rows.top_p[:, None] < 1, ordered.gather(1, place), 0.0))
    threshold = torch.maximum(threshold, rows.min_p[:, None] * ordered[:, :1])
    kept = probs.masked_fill(probs < threshold, 0)
    cdf = kept.cumsum(dim=-1)
    ids = (cdf <= rows.uniform[:, None] * cdf[:, -1:]).sum(dim=-1)
    # Rounding may push the draw past the last kept token.
    last = vocab - 1 - (kept > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(ids, last)


class TopLogprobs(NamedTuple):
    """``logprob [N]``, ``rank [N]`` (1 is the best) of the given ids; the k best ``ids`` and ``logprobs [N, k]``."""

    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def top_logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int) -> TopLogprobs:
    """Raw float32 log-softmax of ``logits [N, V]`` at ``ids [N]`` (-1 is read as 0) and at the k most likely ids."""
    norm = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
    chosen = logits.gather(1, ids.clamp(min=0)[:, None])
    rank = (logits > chosen).sum(dim=-1) + 1
    top = torch.topk(logits, k, dim=-1)
    return TopLogprobs((chosen.float() - norm)[:, 0], rank, top.indices, top.values.float() - norm)
