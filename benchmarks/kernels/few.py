"""Launch constants of small decode steps, chosen inside the layer: ``python -m benchmarks.kernels.few --json OUT``.

For 1, 4 and 16 tokens in FP8, and 1 in NVFP4: every candidate of every kernel is compared with plain torch on fresh
random inputs and run twice, then a CUDA graph of two layers is timed. The best of a kernel stays in force while the
next one is tried, and the last rows say which were chosen. Candidates that the time limit leaves out are reported.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.common import Report, graph_us, parse_args
from benchmarks.kernels.step import (
    LAYERS,
    SCOUT,
    SCOUT_NVFP4,
    Expected,
    Scout,
    compare,
    layer_bytes,
    list_kernels,
    reference,
    separate_operations,
)
from benchmarks.record import end_with
from outrider.kernels import attention_decode, gemm, moe_few, moe_one_nvfp4, overlap, rope_attention
from outrider.kernels.attention_decode import DecodeTile
from outrider.kernels.gemm import SkinnyTile
from outrider.kernels.gemv import GemvTile
from outrider.kernels.moe_gemm import Tile
from outrider.kernels.moe_one_kernels import OneTile
from outrider.models.config import ModelConfig
from outrider.runner.batch import Batch


@dataclass(frozen=True)
class Form:
    """A checkpoint's form: its config, the numbers of tokens to try, bytes of a routed expert's weight."""

    name: str
    config: ModelConfig
    tokens: tuple[int, ...]
    expert_bytes: float


FORMS = (Form("fp8", SCOUT, (1, 4, 16), 1.0), Form("nvfp4", SCOUT_NVFP4, (1,), 9 / 16))
LIMIT_S = 105
"""For each form."""

COMPILERS = 8
"""Processes that compile the candidates before the first is timed, each with a model of its own on the GPU."""

BATCHES = 2
"""Random batches that each candidate is checked on."""

OVERLAPS = (0, 16)
"""OVERLAP_ROWS."""

GEMV = tuple(
    GemvTile(*sizes) for sizes in ((8, 512, 4), (4, 512, 4), (8, 512, 8), (2, 1024, 2), (4, 1024, 2))
)
# Programs of q/k/v and of o on 132 multiprocessors: 224 + 240, 336 + 320, 224 + 160, 224 + 320, 224 + 240, 448 + 320.
SKINNY = (
    SkinnyTile(64, 256, 5, 4, 2),
    SkinnyTile(64, 256, 5, 4, 2, prefetch=1024),
    SkinnyTile(64, 128, 6, 4, 3, prefetch=1024),
    SkinnyTile(32, 512, 4, 4, 2),
    SkinnyTile(32, 512, 4, 4, 2, prefetch=2048),
    SkinnyTile(32, 256, 5, 4, 3),
    SkinnyTile(128, 128, 5, 4, 2, prefetch=512),
    SkinnyTile(16, 512, 5, 2, 3, prefetch=2048),
)
UP = (Tile(16, 64, 128, True, 6, 4), Tile(16, 64, 256, True, 3, 4))
DOWN_ONE = tuple(GemvTile(*sizes) for sizes in ((1, 2048, 4), (1, 1024, 2), (2, 1024, 4), (1, 512, 1)))
UP_ONE = tuple(
    GemvTile(*sizes) for sizes in ((1, 1024, 2), (2, 1024, 4), (2, 1024, 2), (1, 512, 1), (1, 2048, 4))
)
# Programs at one token: 480, 320, 240, 240, 320.
DOWN = (
    Tile(16, 64, 256, True, 5, 4, split_k=3),
    Tile(16, 64, 256, True, 5, 4, split_k=2),
    Tile(16, 128, 256, True, 3, 8, split_k=3),
    Tile(16, 128, 128, True, 5, 4, split_k=3),
    Tile(16, 64, 256, True, 5, 4),
)
ONE = (
    OneTile(),
    OneTile(first=1),
    OneTile(first=660),
    OneTile(first=1 << 30),
    OneTile(outputs=4),
    OneTile(outputs=1),
    OneTile(outputs=4, up_warps=2),
    OneTile(groups=4),
    OneTile(down_registers=128),
    OneTile(down_registers=80),
    OneTile(down_warps=2, down_registers=128),
    OneTile(down_warps=8, down_registers=128),
)
DECODE = (
    DecodeTile(),
    DecodeTile(programs_per_sm=2, merge_at_once=16),
    DecodeTile(programs_per_sm=1, merge_at_once=16),
    DecodeTile(programs_per_sm=4, merge_at_once=8),
    DecodeTile(programs_per_sm=8, merge_at_once=8),
)
DECODE_ONE = (
    DecodeTile(num_stages=1, programs_per_sm=2, merge_at_once=16),
    DecodeTile(num_stages=1, programs_per_sm=4, merge_at_once=8),
    DecodeTile(num_warps=8, num_stages=1, programs_per_sm=4, merge_at_once=16),
    DecodeTile(tokens=128, num_warps=8, num_stages=1, programs_per_sm=4, merge_at_once=8),
)


@dataclass(frozen=True)
class Knob:
    """One kernel's launch constants: how to set them, and what to try."""

    name: str
    use: Callable[[Any], None]
    values: tuple[Any, ...]


def use_overlap(rows: int) -> None:
    """Launches of so many rows overlap."""
    overlap.OVERLAP_ROWS = rows


def use_dense(tile: SkinnyTile | GemvTile) -> None:
    """The q/k/v and the output projection."""
    gemm.GEMV_TILE = tile if isinstance(tile, GemvTile) else None
    if isinstance(tile, SkinnyTile):
        gemm.SKINNY_TILES[torch.float8_e4m3fn] = ((128, tile),)


def use_up(tile: Tile | GemvTile) -> None:
    """The experts' first products."""
    moe_few.UP_ONE_TILE = tile if isinstance(tile, GemvTile) else None
    if isinstance(tile, Tile):
        moe_few.FEW_TILES = (tile, moe_few.FEW_TILES[1])


def use_down(tile: Tile | GemvTile) -> None:
    """The experts' second products."""
    moe_few.DOWN_ONE_TILE = tile if isinstance(tile, GemvTile) else None
    if isinstance(tile, Tile):
        moe_few.FEW_TILES = (moe_few.FEW_TILES[0], tile)


def use_one(tile: OneTile) -> None:
    """Both products of a token's NVFP4 experts."""
    moe_one_nvfp4.ONE_TILE = tile


def use_decode(tile: DecodeTile) -> None:
    """Decode attention."""
    attention_decode.SMALL_STEP_TILES = ((16, tile),)


def use_rope_attention(tile: DecodeTile) -> None:
    """Attention of one token, rope included."""
    rope_attention.TILE = tile


def knobs(form: Form, tokens: int) -> list[Knob]:
    """What to try at this size, in this order."""
    if form.name == "nvfp4":
        return [Knob("dense", use_dense, GEMV), Knob("one", use_one, ONE)]
    one = tokens == 1
    return [
        Knob("overlap", use_overlap, OVERLAPS),
        Knob("dense", use_dense, (*GEMV, *SKINNY) if one else SKINNY),
        Knob("down", use_down, (*DOWN_ONE, *DOWN[:3]) if one else DOWN),
        Knob("attention", use_rope_attention, DECODE_ONE) if one else Knob("decode", use_decode, DECODE),
        Knob("up", use_up, (*UP_ONE, *UP) if one else UP),
    ]


def shipped() -> dict[str, Any]:
    """The constants in the modules."""
    return {
        "gemv": gemm.GEMV_TILE,
        "up_one": moe_few.UP_ONE_TILE,
        "down_one": moe_few.DOWN_ONE_TILE,
        "one": moe_one_nvfp4.ONE_TILE,
        "skinny": gemm.SKINNY_TILES[torch.float8_e4m3fn],
        "few": moe_few.FEW_TILES,
        "decode": attention_decode.SMALL_STEP_TILES,
        "rope_attention": rope_attention.TILE,
        "overlap": overlap.OVERLAP_ROWS,
    }


def start_from_tables(tables: dict[str, Any]) -> None:
    """Put the shipped constants in force."""
    gemm.GEMV_TILE = tables["gemv"]
    moe_few.UP_ONE_TILE, moe_few.DOWN_ONE_TILE = tables["up_one"], tables["down_one"]
    moe_one_nvfp4.ONE_TILE = tables["one"]
    gemm.SKINNY_TILES[torch.float8_e4m3fn] = tables["skinny"]
    moe_few.FEW_TILES = tables["few"]
    attention_decode.SMALL_STEP_TILES = tables["decode"]
    rope_attention.TILE, overlap.OVERLAP_ROWS = tables["rope_attention"], tables["overlap"]


@torch.inference_mode()
def compile_share(form: Form, share: int) -> None:
    """Run every ``COMPILERS``-th candidate once beside the shipped constants: Triton keeps what it compiled on disk."""
    tables = shipped()
    scout = Scout(form.config, torch.device("cuda"), max_seqs=max(form.tokens))
    tried = ((tokens, knob) for tokens in form.tokens for knob in knobs(form, tokens))
    work = [(tokens, knob, value) for tokens, knob in tried for value in knob.values]
    for tokens, knob, value in work[share::COMPILERS]:
        start_from_tables(tables)
        knob.use(value)
        try:
            scout.forward(scout.batch(tokens, 0))
        except Exception as error:  # reported when its turn to be timed comes
            print(f"   {knob.name} {value}: {type(error).__name__}", flush=True)


def compile_all(form: Form) -> None:
    """Compile in parallel; the processes end before anything is timed."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_share, args=(form, share)) for share in range(COMPILERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main() -> None:
    """Every form and size."""
    args = parse_args("Chooses the launch constants of small decode steps.", [form.name for form in FORMS])
    report = Report("few", args.json)
    for form in FORMS:
        if args.only in (None, form.name):
            choose(form, report, args.quick)
            torch.cuda.empty_cache()
    report.write()


@torch.inference_mode()
def choose(form: Form, report: Report, is_quick: bool) -> None:
    """Every size of one form: the shipped tables, every candidate, the best of all."""
    began = time.monotonic()
    if not is_quick:
        compile_all(form)
    print(f"   compiled after {time.monotonic() - began:.0f} s", flush=True)
    scout = Scout(form.config, torch.device("cuda"), max_seqs=max(form.tokens))
    tables = shipped()
    for tokens in form.tokens:
        case = f"layer T={tokens}" if form.name == "fp8" else f"{form.name} layer T={tokens}"
        start_from_tables(tables)
        batches = [scout.batch(tokens, 0) for _ in range(BATCHES)]
        checks = [(batch, reference(scout, batch)) for batch in batches]
        num_bytes = layer_bytes(tokens, form.expert_bytes)

        def measure(
            name: str,
            case: str = case,
            checks: list[tuple[Batch, Expected]] = checks,
            num_bytes: int = num_bytes,
        ) -> float:
            """Microseconds a layer with what is in force, or infinity where it is wrong, fails or comes too late."""
            if time.monotonic() - began > LIMIT_S:
                report.fail(case, name, "no time left")
                return float("inf")
            try:
                wrong = next(filter(None, (compare(scout, *check) for check in checks)), None)
                if wrong:
                    report.fail(case, name, wrong)
                    return float("inf")
                us = graph_us([lambda: scout.forward(checks[0][0])] * 4, 9) / LAYERS
            except Exception as error:  # one candidate that does not fit must not end the run
                report.fail(case, name, (str(error).splitlines() or [repr(error)])[0][:100])
                return float("inf")
            report.memory(case, name, us, num_bytes)
            return us

        if form.name == "nvfp4":
            with separate_operations(scout):
                measure("separate operations")
        measure("tables")
        chosen = {}
        for knob in [] if is_quick else knobs(form, tokens):
            times = []
            for value in knob.values:
                knob.use(value)
                times.append(measure(f"{knob.name} {value}"))
            if min(times) < float("inf"):
                chosen[knob.name] = knob.values[times.index(min(times))]
            start_from_tables(tables)
            for done in knobs(form, tokens):
                if done.name in chosen:
                    done.use(chosen[done.name])
        for name, value in chosen.items():
            print(f"   chosen {name}: {value}", flush=True)
        measure(f"chosen {chosen}")
        list_kernels(scout, batches[0])
    start_from_tables(tables)


if __name__ == "__main__":
    end_with(main)
