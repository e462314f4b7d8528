"""Choosing token ids from logits on the device, and the log-probabilities that are reported beside them.

Called by the runner once per step with the rows that sample. No step here waits for the host, and nothing is
sorted: top-k, top-p and min-p are thresholds on the logit, found by bisection. Penalties, biases and grammar
masks have already been applied to the logits (a masked token is -inf).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from outrider.kernels._dispatch import ceil_div, on_gpu, power_of_two_at_least
from outrider.kernels.invariant import by_blocks, is_invariant


class LogitTile(NamedTuple):
    """Launch constants: logits that a program holds at a time, warps."""

    logits: int
    warps: int


BEST_TILE, GREEDY_TILE, DRAW_TILE = LogitTile(4096, 4), LogitTile(8192, 1), LogitTile(8192, 16)
"""Of the pass that finds the maxima, and of the one that finishes a row: greedily, which reads no logits, or drawing.

Not tuned. H200, 2026-11-27, 1 / 64 / 512 rows of 202,048: greedy 3.8 / 12.3 / 62.8 us, with a temperature 50.5 / 60.8 /
313, with top_p 713 / 741 / 4,106: benchmarks/results/kernels_h200.json
"""
LOWEST: tl.constexpr = tl.constexpr(80.0)
"""Log-weights below minus this (1e-35 of the best token's probability) are never drawn."""


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
    if on_gpu(logits):
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
    """The stochastic rows' ids."""
    temperature = torch.where(rows.temperature == 0, 1.0, rows.temperature)
    kept = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    threshold = rows.min_p[:, None] * kept.amax(dim=-1, keepdim=True)
    if bool(((rows.top_k > 0) | (rows.top_p < 1)).any()):
        threshold = torch.maximum(threshold, _lowest_kept(kept, rows))
    kept.masked_fill_(kept < threshold, 0)
    cdf = kept.cumsum(dim=-1)
    target = rows.uniform[:, None] * cdf[:, -1:]
    # An equal sum is passed over: it would be an id of no mass. Rounding must not pass the last kept id.
    ids = torch.searchsorted(cdf, target, right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.minimum(ids, last)[:, 0]


def _lowest_kept(probs: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The smallest probability ``[N, 1]`` that top_k and then top_p keep; sorting is fine on a CPU."""
    vocab = probs.shape[-1]
    ordered = probs.sort(dim=-1, descending=True).values
    k = torch.where(rows.top_k <= 0, vocab, rows.top_k.clamp(max=vocab)).long()
    threshold = ordered.gather(1, k[:, None] - 1)
    mass = ordered.masked_fill(ordered < threshold, 0).cumsum(dim=-1)
    # The first place where the kept mass reaches top_p; a sum that rounding leaves short keeps everything.
    place = (mass < rows.top_p[:, None] * mass[:, -1:]).sum(dim=-1, keepdim=True).clamp_(max=vocab - 1)
    return torch.maximum(threshold, torch.where(rows.top_p[:, None] < 1, ordered.gather(1, place), 0.0))


class TopLogprobs(NamedTuple):
    """``logprob [N]``, ``rank [N]`` (1 is the best) of the given ids; the k best ``ids`` and ``logprobs [N, k]``."""

    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


LOGPROB_ROWS = 64
"""Rows whose logits exist in float32 at once, besides what sampling itself needs (64 x 202,048 x 4 B = 49 MiB)."""


def top_logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int) -> TopLogprobs:
    """Raw float32 log-softmax of ``logits [N, V]`` at ``ids [N]`` (-1 is read as 0) and at the k most likely ids."""
    if is_invariant():
        return TopLogprobs(*by_blocks(lambda x, i: _top_logprobs(x, i, k, stable=True), logits, ids))
    parts = [
        _top_logprobs(logits[i : i + LOGPROB_ROWS], ids[i : i + LOGPROB_ROWS], k, stable=False)
        for i in range(0, max(1, len(ids)), LOGPROB_ROWS)
    ]
    return parts[0] if len(parts) == 1 else TopLogprobs(*map(torch.cat, zip(*parts, strict=True)))


def _top_logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int, stable: bool) -> TopLogprobs:
    """``stable``: equals come in the order of their ids, whatever k is."""
    norm = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
    chosen = logits.gather(1, ids.clamp(min=0)[:, None])
    rank = (logits > chosen).sum(dim=-1) + 1
    if stable:
        values, top_ids = (x[:, :k] for x in logits.sort(dim=-1, descending=True, stable=True))
    else:
        values, top_ids = torch.topk(logits, k, dim=-1)
    return TopLogprobs((chosen.float() - norm)[:, 0], rank, top_ids, values.float() - norm)


@triton.jit
def _row_best_kernel(logits_ptr, best_ptr, id_ptr, stride, vocab, TILE: tl.constexpr):
    """Highest logit and its lowest id of one tile of one row; NaN when the tile has one."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = part * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * stride + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    has_nan = tl.max((x != x).to(tl.int32), 0) > 0
    best = tl.max(x, 0)
    place = tl.min(tl.where(x == best, cols, vocab), 0)
    out = row * tl.num_programs(1) + part
    tl.store(best_ptr + out, tl.where(has_nan, float("nan"), best))
    tl.store(id_ptr + out, place)


@triton.jit
def _scaled_tile(logits_ptr, tile, vocab, best, inv_temperature, TILE: tl.constexpr):
    """``(logit - best) / temperature`` of one tile: log-weights at most 0."""
    cols = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    return (x - best) * inv_temperature


@triton.jit
def _above(logits_ptr, threshold, vocab, best, inv_temperature, TILE: tl.constexpr):
    """How many tokens have a log-weight of at least ``threshold``, and their mass."""
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    for tile in tl.range(0, tl.cdiv(vocab, TILE)):
        y = _scaled_tile(logits_ptr, tile, vocab, best, inv_temperature, TILE)
        kept = y >= threshold
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(y), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _bisect(logits_ptr, low, wanted_count, wanted_mass, vocab, best, inv_temperature, TILE: tl.constexpr):
    """The highest threshold that still keeps ``wanted_count`` tokens and ``wanted_mass``; ``low`` keeps both.

    It stops when at most one token lies between the two ends, or when no float does (equal logits).
    """
    high = 0.0
    low_count, low_mass = _above(logits_ptr, low, vocab, best, inv_temperature, TILE)
    high_count, high_mass = _above(logits_ptr, high, vocab, best, inv_temperature, TILE)
    if (high_count >= wanted_count) & (high_mass >= wanted_mass):
        low = high
        low_mass = high_mass
        low_count = high_count
    middle = 0.5 * (low + high)
    while (low_count - high_count > 1) & (middle > low) & (middle < high):
        count, mass = _above(logits_ptr, middle, vocab, best, inv_temperature, TILE)
        if (count >= wanted_count) & (mass >= wanted_mass):
            low = middle
            low_count = count
            low_mass = mass
        else:
            high = middle
            high_count = count
        middle = 0.5 * (low + high)
    return low, low_mass


@triton.jit
def _draw_id(logits_ptr, threshold, target, vocab, best, inv_temperature, TILE: tl.constexpr):
    """The first kept id whose cumulative mass exceeds ``target``; the last kept id if rounding leaves none."""
    passed = 0.0
    chosen = -1
    last = 0
    for tile in tl.range(0, tl.cdiv(vocab, TILE)):
        y = _scaled_tile(logits_ptr, tile, vocab, best, inv_temperature, TILE)
        cols = tile * TILE + tl.arange(0, TILE)
        weight = tl.where(y >= threshold, tl.exp(y), 0.0)
        mass = tl.sum(weight, 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, cols, 0), 0))
        if (chosen < 0) & (passed + mass > target):
            over = (passed + tl.cumsum(weight, 0) > target) & (weight > 0)
            first = tl.min(tl.where(over, cols, vocab), 0)
            if first < vocab:
                chosen = first
        passed += mass
    return tl.where(chosen < 0, last, chosen)


@triton.jit
def _choose_kernel(
    logits_ptr,
    best_ptr,
    best_id_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    min_p_ptr,
    uniform_ptr,
    out_ptr,
    stride,
    vocab,
    num_parts,
    GREEDY: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program finishes one row."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    maxima = tl.load(best_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    ids = tl.load(best_id_ptr + row * num_parts + parts, mask=parts < num_parts, other=vocab)
    has_nan = tl.max((maxima != maxima).to(tl.int32), 0) > 0
    best = tl.max(maxima, 0)
    chosen = tl.min(tl.where(maxima == best, ids, vocab), 0)
    broken = has_nan | (tl.abs(best) == float("inf"))
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        if (temperature > 0) & (top_k != 1) & (broken == 0):
            inv = 1.0 / temperature
            top_p = tl.load(top_p_ptr + row)
            logits_ptr += row * stride
            threshold = -LOWEST
            _, mass = _above(logits_ptr, threshold, vocab, best, inv, TILE)
            if (top_k > 0) & (top_k < vocab):
                threshold, mass = _bisect(logits_ptr, threshold, top_k, 0.0, vocab, best, inv, TILE)
            if top_p < 1.0:
                threshold, mass = _bisect(logits_ptr, threshold, 0, top_p * mass, vocab, best, inv, TILE)
            floor = tl.log(tl.load(min_p_ptr + row))
            if floor > threshold:
                threshold = tl.minimum(floor, 0.0)
                _, mass = _above(logits_ptr, threshold, vocab, best, inv, TILE)
            target = tl.load(uniform_ptr + row) * mass
            chosen = _draw_id(logits_ptr, threshold, target, vocab, best, inv, TILE)
    tl.store(out_ptr + row, tl.where(broken, -1, chosen).to(tl.int64))


def sample_triton(logits: torch.Tensor, rows: SamplingRows, all_greedy: bool = False) -> torch.Tensor:
    """Find every row's maximum over many programs, then finish each row in one; see ``sample``."""
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_parts = ceil_div(vocab, BEST_TILE.logits)
    best = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    best_id = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    _row_best_kernel[(num_rows, num_parts)](
        logits, best, best_id, logits.stride(0), vocab, TILE=BEST_TILE.logits, num_warps=BEST_TILE.warps
    )
    tile = GREEDY_TILE if all_greedy else DRAW_TILE
    _choose_kernel[(num_rows,)](
        logits,
        best,
        best_id,
        *rows,
        out,
        logits.stride(0),
        vocab,
        num_parts,
        GREEDY=all_greedy,
        PARTS=power_of_two_at_least(num_parts, 2),
        TILE=tile.logits,
        num_warps=tile.warps,
    )
    return out


_POINTERS = {
    "logits_ptr": "*bf16",
    "best_ptr": "*fp32",
    "best_id_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_p_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "min_p_ptr": "*fp32",
    "uniform_ptr": "*fp32",
    "out_ptr": "*i64",
}
_SIZES = {"stride": "i32", "vocab": "i32", "num_parts": "i32"}
_BEST = {"logits_ptr": "*bf16", "best_ptr": "*fp32", "id_ptr": "*i32", "stride": "i32", "vocab": "i32"}
_CHOOSE = {**_POINTERS, **_SIZES}
AOT_SPECS = [
    (_row_best_kernel, _BEST, {"TILE": BEST_TILE.logits}, {"num_warps": BEST_TILE.warps}),
    *(
        (
            _choose_kernel,
            _CHOOSE,
            {"PARTS": 64, "TILE": tile.logits, "GREEDY": tile is GREEDY_TILE},
            {"num_warps": tile.warps},
        )
        for tile in (GREEDY_TILE, DRAW_TILE)
    ),
]
