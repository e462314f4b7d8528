"""One layer of Scout as a step runs it, checked and timed: ``python -m benchmarks.kernels.step --json OUT``.

Two layers with random FP8 weights go through the model's own forward pass at several batch sizes. Each result is
compared, row by row, with the plain-torch path on the same device; then a CUDA graph of the pass is timed and its
kernels are listed. With ``--quick`` the candidate tiles are left out.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args
from benchmarks.record import end_with
from outrider.kernels import gemm, moe, moe_few_kernels, moe_one_nvfp4, overlap, router
from outrider.kernels.gemm import SkinnyTile
from outrider.kernels.moe_gemm import Tile
from outrider.kv_layout import plan_layout
from outrider.models.config import ModelConfig, QuantConfig
from outrider.models.decoder import Decoder
from outrider.models.registry import load_model
from outrider.parallel import Parallel
from outrider.quant.few_rows import Nvfp4OneRow
from outrider.runner.batch import AttentionBatch, Batch
from outrider.runner.kv_cache import KVCache

LAYERS, BLOCK_SIZE, CONTEXT = 2, 64, 1024
STEPS = ((1, 0), (8, 0), (16, 0), (64, 0), (256, 0), (100, 512), (0, 1024))
"""(decodes, prompt tokens of one sequence)."""
ROW_LIMIT = 0.08
"""A row may differ by so much, unless a router tie moved its token to another expert."""
FIRST_TOKENS = 16
"""Tokens of a prompt that one token before them, routed elsewhere, moves beyond that: a sixteenth of what they see.

H200, 2026-11-27, four random batches: rows beyond the limit without a tie were the first to thirteenth behind one.
"""
TIE_GAP, MOST_TIES = 0.1, 0.1
"""What counts as a tie, in standard deviations of the router's logits, and the largest share of rows that ties move.

A single row is always allowed to be one: among few rows it is a large share.

H200, 2026-11-26: of 612 rows 14 were beyond the limit and of 1,024 rows 42, all of them routed elsewhere; the rows that
were routed alike differed by 0.062 at most, 0.044 in the median.
"""

SCOUT = ModelConfig(
    architecture="Llama4ForConditionalGeneration",
    vocab_size=4096,  # the head is measured by ``gemm``
    hidden_size=5120,
    num_layers=LAYERS,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    dtype="bfloat16",
    rope_layers=(True, False),
    moe_layers=(True, True),
    interleaved_rope=True,
    intermediate_size_mlp=16384,
    num_experts=16,
    attention_chunk_size=8192,
    use_qk_norm=True,
    attn_temperature_tuning=True,
    quant=QuantConfig("FP8", "FP8"),
)
SCOUT_NVFP4 = replace(SCOUT, quant=QuantConfig("NVFP4", "FP8", group_size=16))

SKINNY = tuple(
    SkinnyTile(outputs, depth, stages, 4, programs)
    for (outputs, depth, stages), programs in product(
        ((64, 256, 5), (64, 256, 3), (32, 256, 6), (128, 128, 5)), (1, 2)
    )
)
WIDE = (
    (Tile(64, 64, 128, True, 5, 4), Tile(64, 128, 128, True, 5, 4)),
    (Tile(128, 128, 128, True, 4, 8), Tile(128, 128, 128, True, 4, 8)),
    (Tile(128, 128, 128, True, 4, 8, programs_per_sm=1), Tile(128, 128, 128, True, 5, 8)),
    (Tile(128, 64, 128, True, 5, 4), Tile(128, 128, 128, False, 5, 8)),
    (Tile(128, 128, 128, False, 4, 8, programs_per_sm=1), Tile(128, 128, 128, True, 5, 4)),
    (Tile(64, 128, 128, True, 4, 4), Tile(64, 256, 128, True, 4, 8)),
    (Tile(64, 64, 128, True, 4, 4, programs_per_sm=2), Tile(128, 64, 256, True, 3, 4)),
)


class Scout:
    """The two layers, and a cache full of random keys and values."""

    def __init__(self, config: ModelConfig, device: torch.device, max_seqs: int) -> None:
        fp8 = torch.float8_e4m3fn
        self.config, self.device = config, device
        self.model: Decoder = load_model(
            config,
            "",
            Parallel(),
            load_format="dummy",
            dtype=torch.bfloat16,
            device=device,
            kv_cache_dtype=fp8,
        )
        layout = plan_layout(config.rope_layers, None, CONTEXT, BLOCK_SIZE)
        self.blocks_a_seq = CONTEXT // BLOCK_SIZE
        num_blocks = 1 + max_seqs * self.blocks_a_seq
        self.kv = KVCache(layout, num_blocks, config.num_kv_heads, config.head_dim, fp8, device)
        self.kv.data.view(torch.uint8).random_(0, 256).bitwise_and_(0xBF)  # no NaN, |value| < 2

    def batch(self, decodes: int, prompt: int) -> Batch:
        """Decodes at the end of their context, then one prompt from its start."""
        device, seqs = self.device, decodes + (prompt > 0)
        tables = 1 + torch.randperm(seqs * self.blocks_a_seq, device=device).view(seqs, -1)
        lengths = [CONTEXT] * decodes + [prompt] * (prompt > 0)
        positions = torch.tensor([CONTEXT - 1] * decodes + list(range(prompt)), device=device)
        owner = torch.tensor([*range(decodes), *[decodes] * prompt], device=device)
        slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = [*range(decodes + 1), *[decodes + prompt] * (prompt > 0)]
        attention = AttentionBatch(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_tables=tables.int()[None],
            slots=slots[None],
            num_decodes=decodes,
            max_query_len=max(1, prompt),
            max_seq_len=CONTEXT,
        )
        tokens = torch.randint(self.config.vocab_size, (decodes + prompt,), device=device)
        return Batch(tokens, positions, attention)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Both layers and the last norm."""
        return self.model.forward(batch, self.kv)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Send every operation to its reference."""
    modules = [
        m for n, m in sys.modules.items() if n.startswith("outrider.kernels.") and hasattr(m, "on_gpu")
    ]
    saved = [(module, module.on_gpu) for module in modules]
    for module in modules:
        module.on_gpu = lambda _: False
    try:
        yield
    finally:
        for module, function in saved:
            module.on_gpu = function


@contextmanager
def one_after_another() -> Iterator[None]:
    """Launch every kernel when the one before has ended, in small steps too."""
    saved, overlap.OVERLAP_ROWS = overlap.OVERLAP_ROWS, 0
    try:
        yield
    finally:
        overlap.OVERLAP_ROWS = saved


@contextmanager
def separate_operations(scout: Scout, but: tuple[type, ...] = ()) -> Iterator[None]:
    """Run the separate operations of MoE layers that have a form for few rows, unless that is one of ``but``."""
    saved = [layer.feed_forward.few_rows for layer in scout.model.layers]
    for layer in scout.model.layers:
        if not isinstance(layer.feed_forward.few_rows, but):
            layer.feed_forward.few_rows = None
    try:
        yield
    finally:
        for layer, few in zip(scout.model.layers, saved, strict=True):
            layer.feed_forward.few_rows = few


class Expected(NamedTuple):
    """Hidden states ``[T, M]`` of plain torch, and how near each token came to another expert.

    ``gaps [T]``: the smallest distance between a token's two best router logits over the layers, in standard
    deviations of all logits. Rounding moves a token with a tiny gap to the other expert, rightly. The first tokens of
    a prompt see few others, so that each has the gap of those before it too.
    """

    states: torch.Tensor
    gaps: torch.Tensor


def reference(scout: Scout, batch: Batch) -> Expected:
    """What ``forward`` should give, by plain torch on the same device."""
    gaps = []

    def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        best, second = logits.float().topk(2, dim=-1).values.unbind(-1)
        gaps.append((best - second) / logits.float().std())
        return moe.route_reference(logits, top_k)

    with (
        plain_torch(),
        mock.patch.object(router, "route_reference", route),
        mock.patch.object(moe_one_nvfp4, "route_reference", route),
        separate_operations(scout, but=(Nvfp4OneRow,)),  # repacked experts have no other plain torch
    ):
        states = scout.forward(batch)
    smallest = torch.stack(gaps).amin(0)
    first = smallest[batch.attention.num_decodes :][:FIRST_TOKENS]
    if len(first):
        first.copy_(first.cummin(0).values)
    return Expected(states, smallest)


def check(scout: Scout, batch: Batch, takes_few: bool) -> str | None:
    """None if the fast path agrees with plain torch, else what is wrong."""
    for layer in scout.model.layers:
        few = layer.feed_forward.few_rows
        if few is not None:
            assert few.takes(torch.empty(len(batch.token_ids), 1, device=scout.device)) == takes_few
    return compare(scout, batch, reference(scout, batch))


def compare(scout: Scout, batch: Batch, expected: Expected) -> str | None:
    """None if two runs of the fast path are equal to the last bit and near ``expected``, else what is wrong."""
    out = scout.forward(batch).clone()
    if not torch.equal(out, scout.forward(batch)):
        return "two runs differ"
    wide = expected.states.double()
    errors = (out.double() - wide).norm(dim=1) / wide.norm(dim=1)
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    far = errors > ROW_LIMIT
    gap = float(expected.gaps[far].max()) if bool(far.any()) else 0.0
    print(
        f"   rows beyond {ROW_LIMIT}: {int(far.sum())} of {len(far)}, their router gaps up to {gap:.4f}; "
        f"median error {float(errors.median()):.4f}",
        flush=True,
    )
    if gap > TIE_GAP:
        return f"a row beyond {ROW_LIMIT} was no router tie (gap {gap:.3f})"
    is_few = int(far.sum()) <= max(1, MOST_TIES * len(far))
    return None if is_few else f"{int(far.sum())} rows of {len(far)} are wrong"


def list_kernels(scout: Scout, batch: Batch) -> None:
    """Kernels of one pass, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            scout.forward(batch)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    for event in events[:16]:
        us = event.device_time_total / 3 / LAYERS
        print(f"   {event.key[:60]:<60} {event.count / 3 / LAYERS:>5.1f} a layer {us:>8.1f} us", flush=True)


def list_host_costs(scout: Scout, batch: Batch, passes: int = 20) -> None:
    """What the host spends on a pass without a graph, and the functions that it spends it in."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(passes):
        scout.forward(batch)
    us = (time.perf_counter() - start) / passes / LAYERS * 1e6
    torch.cuda.synchronize()
    print(f"   host: {us:.0f} us a layer without a graph", flush=True)
    profile = cProfile.Profile()
    with profile:
        for _ in range(passes):
            scout.forward(batch)
    torch.cuda.synchronize()
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(14)


def try_tiles(
    report: Report,
    case: str,
    measure: Callable[[], float],
    tables: list[tuple[str, Callable[[], None]]],
    bytes_read: int,
) -> None:
    """Time the pass with each candidate in force."""
    for name, use in tables:
        use()
        try:
            report.memory(case, name, measure(), bytes_read)
        except Exception as error:  # one candidate that does not fit must not end the run
            report.fail(case, name, str(error).splitlines()[0][:100])


def candidates(decodes: int, prompt: int) -> list[tuple[str, Callable[[], None]]]:
    """What to try at this size: skinny tiles, or the grouped product's. Up to 16 tokens: ``few``."""
    tokens = decodes + prompt
    skinny, fp8 = dict(gemm.SKINNY_TILES), moe.HOPPER_FP8_TILES
    code = torch.float8_e4m3fn

    def use_skinny(tile: SkinnyTile | None) -> None:
        gemm.SKINNY_TILES[code] = skinny[code] if tile is None else ((128, tile),)

    def use_wide(pair: tuple[Tile, Tile] | None) -> None:
        moe.HOPPER_FP8_TILES = fp8 if pair is None else ((1 << 30, *pair),)

    out: list[tuple[str, Callable[[], None]]] = []
    if tokens == 64:
        out += [(f"skinny {t}", lambda t=t: use_skinny(t)) for t in SKINNY]
        out += [("skinny table", lambda: use_skinny(None))]
    if tokens in (612, 1024):
        out += [(f"wide {pair}", lambda pair=pair: use_wide(pair)) for pair in WIDE]
        out += [("wide table", lambda: use_wide(None))]
    return out


@torch.inference_mode()
def main() -> None:
    """Every size: check, time, list."""
    args = parse_args("Checks and times one layer of Scout at several batch sizes.")
    report = Report("step", args.json)
    scout = Scout(SCOUT, torch.device("cuda"), max_seqs=max(d + 1 for d, _ in STEPS))
    for decodes, prompt in STEPS:
        tokens = decodes + prompt
        batch = scout.batch(decodes, prompt)
        case = f"layer T={tokens}"
        wrong = check(scout, batch, tokens <= moe_few_kernels.FEW_ROWS)
        if wrong:
            report.fail(case, "check", wrong)

        def measure(batch: Batch = batch) -> float:
            return graph_us([lambda: scout.forward(batch)], 9) / LAYERS

        # The share of the copy rate follows from the weights that the chosen experts make it read.
        report.memory(case, "table", measure(), layer_bytes(tokens))
        list_kernels(scout, batch)
        if tokens == 1:
            list_host_costs(scout, batch)
        if tokens <= overlap.OVERLAP_ROWS:
            with one_after_another():
                wrong = check(scout, batch, tokens <= moe_few_kernels.FEW_ROWS)
                if wrong:
                    report.fail(case, "check one after another", wrong)
                report.memory(case, "one after another", measure(), layer_bytes(tokens))
        if not args.quick:
            try_tiles(report, case, measure, candidates(decodes, prompt), layer_bytes(tokens))
    report.write()


def layer_bytes(tokens: int, expert_bytes: float = 1.0) -> int:
    """Weights of one layer that ``tokens`` tokens with evenly spread experts read, these of so many bytes a weight."""
    hidden, inter, experts = SCOUT.hidden_size, SCOUT.intermediate_size, SCOUT.num_experts
    chosen = experts * (1 - (1 - 1 / experts) ** tokens)
    return int(hidden * (128 * 56 + 5120) + 3 * hidden * inter * (1 + chosen * expert_bytes))


if __name__ == "__main__":
    end_with(main)
