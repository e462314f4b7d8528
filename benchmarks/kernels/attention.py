"""Paged attention on a GPU: ``python -m benchmarks.kernels.attention --json OUT``.

The shapes are one layer of Llama 4 Scout on one GPU (40 query heads, 8 kv heads, D = 128) with an FP8 cache of
64-token blocks, blocks scattered at random. Decode is memory-bound: the floor is one read of every key and value.
Prefill is compute-bound: 4 * D FLOP for each query head and visible pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args, relative_error
from benchmarks.record import end_with
from outrider.kernels.attention_decode import DecodeTile, decode_attention
from outrider.kernels.attention_prefill import PrefillTile, prefill_attention

H, K, D, BLOCK, LAYERS = 40, 8, 128, 64, 4
SM_SCALE, K_SCALE, V_SCALE = D**-0.5, 0.02, 0.03
L2_BYTES = 100 << 20

DECODE_TILES = [
    DecodeTile(*constants)
    for constants in (
        (64, 4, 1), (64, 4, 3), (64, 4, 5), (64, 2, 1), (64, 2, 3), (64, 2, 5),
        (64, 1, 3), (128, 4, 3), (128, 4, 5), (128, 2, 3), (128, 8, 3), (32, 1, 3),
    )
]  # fmt: skip
PROGRAMS_PER_SM = (1, 4, 8, 32, 64)
PREFILL_TILES: list[PrefillTile | None] = [
    None,
    *(
        PrefillTile(*constants)
        for constants in (
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2),
            (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 2), (256, 32, 8, 3),
        )
    ),
]  # fmt: skip


@dataclass
class Problem:
    """One batch over the pool: everything but the launch constants."""

    q: torch.Tensor
    tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    layer: int
    out: torch.Tensor


class Pool:
    """A KV pool of random FP8 values, laid out as the server lays it out."""

    def __init__(self, num_blocks: int) -> None:
        shape = (num_blocks, LAYERS, 2, K, BLOCK, D)
        self.data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
        pattern = (torch.randn((1024, *shape[1:]), device="cuda") / 0.02).clamp(-448, 448).to(self.data.dtype)
        for first in range(0, num_blocks, 1024):
            part = self.data[first : first + 1024]
            part.copy_(pattern[: part.shape[0]])

    def problem(self, query_lens: list[int], seq_lens: list[int], layer: int) -> Problem:
        """A batch whose sequences own disjoint random blocks."""
        width = -(-max(seq_lens) // BLOCK)
        order = torch.randperm(self.data.shape[0] - 1)[: len(seq_lens) * width] + 1
        tables = order.view(len(seq_lens), width).int().cuda()
        starts = torch.tensor([0, *query_lens]).cumsum(0).int().cuda()
        q = torch.randn(sum(query_lens), H, D, device="cuda", dtype=torch.bfloat16)
        lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
        out = torch.full((len(q), H * D), float("nan"), device="cuda", dtype=q.dtype)
        return Problem(q, tables, starts, lens, max(seq_lens), layer, out)

    def cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self.data[:, layer, 0], self.data[:, layer, 1]


def run_decode(pool: Pool, p: Problem, tile: DecodeTile, chunk: int | None = None) -> torch.Tensor:
    """One decode launch."""
    k, v = pool.cache(p.layer)
    decode_attention(
        p.q, k, v, p.tables, p.seq_lens, p.max_seq_len, SM_SCALE, chunk, K_SCALE, V_SCALE, p.out, tile
    )
    return p.out


def run_prefill(pool: Pool, p: Problem, tile: PrefillTile | None, chunk: int | None = None) -> torch.Tensor:
    """One prefill launch; None for the tile that the table has."""
    k, v = pool.cache(p.layer)
    prefill_attention(
        p.q, k, v, p.tables, p.query_start, p.seq_lens, 0, SM_SCALE, chunk, K_SCALE, V_SCALE, p.out, tile
    )
    return p.out


def oracle(pool: Pool, p: Problem, chunk: int | None) -> torch.Tensor:
    """Float64 attention, one sequence at a time."""
    k_cache, v_cache = pool.cache(p.layer)
    starts = p.query_start.tolist()
    rows = []
    for s, length in enumerate(p.seq_lens.tolist()):
        blocks = p.tables[s, : -(-length // BLOCK)].long()
        k = k_cache[blocks].double().transpose(1, 2).reshape(-1, K, D)[:length] * K_SCALE
        v = v_cache[blocks].double().transpose(1, 2).reshape(-1, K, D)[:length] * V_SCALE
        q = p.q[starts[s] : starts[s + 1]].double().view(-1, K, H // K, D)
        i = torch.arange(length - len(q), length, device="cuda")[:, None]
        j = torch.arange(length, device="cuda")
        visible = j <= i
        if chunk is not None:
            visible &= j // chunk == i // chunk
        scores = torch.einsum("nkgd,jkd->kgnj", q, k) * SM_SCALE
        probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        rows.append(torch.einsum("kgnj,jkd->nkgd", probs, v).reshape(-1, H * D))
    return torch.cat(rows)


def spread(mean: int, count: int) -> list[int]:
    """``count`` lengths between 2/3 and 4/3 of the mean; exactly the mean when there is one."""
    if count == 1:
        return [mean]
    return torch.linspace(mean * 2 / 3, mean * 4 / 3, count).long()[torch.randperm(count)].tolist()


def check(report: Report, pool: Pool) -> tuple[list[DecodeTile], list[PrefillTile | None]]:
    """Drop the variants that fail or are wrong on a ragged problem, with and without chunks."""
    good: tuple[list[DecodeTile], list[PrefillTile | None]] = ([], [])
    lens = [1, 63, 64, 65, 700, 1025, 129, 2500]
    decode = pool.problem([1] * len(lens), lens, 1)
    prefill = pool.problem([1, 60, 2, 65, 300, 26, 129, 700], lens, 2)
    for problem, tiles, run, kept in (
        (decode, DECODE_TILES, run_decode, good[0]),
        (prefill, PREFILL_TILES, run_prefill, good[1]),
    ):
        expected = {chunk: oracle(pool, problem, chunk) for chunk in (None, 512)}
        for tile in tiles:
            name = f"{type(tile).__name__}{tuple(tile or ())}"
            try:
                errors = []
                for chunk, exact in expected.items():
                    problem.out.fill_(float("nan"))
                    errors.append(relative_error(run(pool, problem, tile, chunk), exact))
            except Exception as error:
                report.fail("check", name, f"{type(error).__name__}: {str(error)[:80]}")
                continue
            if max(errors) < 5e-3:
                kept.append(tile)
            else:
                report.fail("check", name, f"relative errors {errors}")
    return good


def time_decode(report: Report, pool: Pool, batch: int, context: int, tiles: list[DecodeTile]) -> None:
    """Rows of one decode shape, one for each tile."""
    lens = spread(context, batch)
    num_bytes = sum(lens) * 2 * K * D
    copies = max(LAYERS, min(32, L2_BYTES // num_bytes + 1))
    problems = [pool.problem([1] * batch, lens, r % LAYERS) for r in range(copies)]
    for tile in tiles:
        calls = [lambda p=p, tile=tile: run_decode(pool, p, tile) for p in problems]
        report.memory(f"decode {batch} x {context}", str(tuple(tile)), graph_us(calls), num_bytes)


def time_prefill(
    report: Report,
    pool: Pool,
    queries: list[int],
    lens: list[int],
    chunk: int | None,
    tiles: list[PrefillTile | None],
) -> None:
    """Rows of one prefill shape, one for each tile."""
    pairs = 0
    for count, length in zip(queries, lens, strict=True):
        i = torch.arange(length - count, length)
        pairs += int((i + 1 - (i // chunk * chunk if chunk else 0)).sum())
    problems = [pool.problem(queries, lens, r) for r in range(2)]
    name = f"prefill {len(queries)} x {queries[0]} of {lens[0]}" + (f" chunk {chunk}" if chunk else "")
    for tile in tiles:
        calls = [lambda p=p, tile=tile: run_prefill(pool, p, tile, chunk) for p in problems]
        report.compute(
            name, str(tuple(tile)) if tile else "table", graph_us(calls, 5), 4.0 * D * H * pairs, "bf16"
        )


def main() -> None:
    """Check every variant, time the variants on the key shapes and the default on all shapes."""
    args = parse_args(__doc__ or "")
    torch.manual_seed(torch.seed() % 2**31)
    report = Report("attention", args.json)
    pool = Pool(min(90_000, torch.cuda.mem_get_info()[0] * 6 // 10 // (LAYERS * 2 * K * BLOCK * D)))
    if args.quick:
        DECODE_TILES[:], PREFILL_TILES[:] = [DecodeTile()], [None]
    decode_tiles, prefill_tiles = check(report, pool)
    if not args.quick:
        for batch, context in ((150, 1536), (1, 1024), (512, 1536)):
            time_decode(report, pool, batch, context, decode_tiles)
            more = [DecodeTile(programs_per_sm=n) for n in PROGRAMS_PER_SM]
            time_decode(report, pool, batch, context, more)
    shapes = [(b, c) for c in (1024, 1536, 8192) for b in (1, 8, 64, 150, 512)] + [(1, 32768), (1, 131072)]
    capacity = pool.data.shape[0] * BLOCK
    for batch, context in shapes:
        if batch * context * 1.34 < capacity:
            time_decode(report, pool, batch, context, [DecodeTile()])
    time_prefill(report, pool, [8192], [8192], None, prefill_tiles)
    for queries, lens, chunk in (
        ([1024], [1024], None),
        ([1024] * 8, [1024] * 8, None),
        ([8192], [32768], None),
        ([8192], [20000], 8192),
        ([300], [1024], None),
    ):
        time_prefill(report, pool, queries, lens, chunk, [None])
    report.write()


if __name__ == "__main__":
    end_with(main)
