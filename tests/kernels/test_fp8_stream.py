"""The streamed FP8 products of Hopper: their order of tiles anywhere, their bits on a GPU."""

from __future__ import annotations

import types

import pytest
import torch
import triton
import triton.language as tl

from outrider.kernels import fp8_stream, moe
from outrider.kernels._dispatch import interpreted
from outrider.kernels.fp8_stream import StreamTile
from outrider.kernels.fp8_stream_kernels import _find_tile
from outrider.kernels.moe_gemm import Tile

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs a Gluon function outside Gluon")
PAIRS = [pair for _, *pair in moe.HOPPER_FP8_TILES if any(isinstance(tile, StreamTile) for tile in pair)]

# Only scalars: what both languages share, so Triton's interpreter can run it.
find_tile = types.FunctionType(_find_tile.fn.__code__, {"gl": tl, "range": range})


@triton.jit
def _list_tiles_kernel(offsets_ptr, out_ptr, tiles_n, EXPERTS: tl.constexpr):
    tile = tl.program_id(0)
    expert, row, left, tile_n = find_tile(offsets_ptr, tile, tiles_n, 64, 128, EXPERTS)
    tl.store(out_ptr + 4 * tile, expert)
    tl.store(out_ptr + 4 * tile + 1, row)
    tl.store(out_ptr + 4 * tile + 2, left)
    tl.store(out_ptr + 4 * tile + 3, tile_n)


def list_tiles(counts: list[int], tiles_n: int, length: int) -> list[tuple[int, ...]]:
    """The first ``length`` tiles of experts with so many rows: ``(expert, first row, rows left, output tile)``."""
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    out = torch.zeros(length, 4, dtype=torch.int32)
    _list_tiles_kernel[(length,)](offsets, out, tiles_n, EXPERTS=len(counts))
    return [tuple(tile) for tile in out.tolist()]


@needs_interpreter
@pytest.mark.parametrize("counts", [[0, 70, 64, 0, 300], [1], [0, 0, 5, 129, 128, 40, 0]], ids=str)
def test_every_tile_has_its_place(counts):
    """Guards: tiles left out or done twice, experts without rows, a narrow expert in front of a wide one."""
    starts = [sum(counts[:expert]) for expert in range(len(counts))]
    expected = [
        (expert, starts[expert] + row, count - row, tile_n)
        for expert, count in enumerate(counts)
        for row in range(0, count, 128)
        for tile_n in range(3)
    ]
    tiles = list_tiles(counts, 3, len(expected) + 4)
    assert sorted(tiles[: len(expected)]) == expected
    assert all(left <= 0 for _, _, left, _ in tiles[len(expected) :])
    narrow = [counts[expert] <= 64 for expert, *_ in tiles[: len(expected)]]
    assert narrow == sorted(narrow)


@needs_interpreter
def test_the_next_expert_begins_with_another_block():
    """Guards: an even number of programs, half of which get all full blocks of experts that have two."""
    rows = [row for _, row, *_ in list_tiles([130, 130], 1, 4)]
    assert rows == [0, 128, 130 + 128, 130]


def test_experts_elsewhere_do_not_stream():
    """Guards: the path of a device without wgmma, for shapes that would stream on Hopper."""
    w13, w2 = torch.empty(16, 2 * 8192, 5120, device="meta"), torch.empty(16, 5120, 8192, device="meta")
    assert not fp8_stream.can_stream(w13, w2)


def test_shapes_that_stream(monkeypatch):
    """Guards: a shard too shallow for the ring, half blocks of 64, and more experts than a program looks through."""
    monkeypatch.setattr(fp8_stream, "_has_wgmma", lambda device: True)

    def can(experts: int, hidden: int, inter: int) -> bool:
        w13 = torch.empty(experts, 2 * inter, hidden, device="meta")
        return fp8_stream.can_stream(w13, torch.empty(experts, hidden, inter, device="meta"))

    assert can(16, 5120, 8192) and can(16, 5120, 1024) and can(2, 5120, 8192)
    assert not can(16, 5120, 512) and not can(16, 5120, 1040) and not can(128, 5120, 8192)


def test_the_tiles_in_use_are_those_that_the_compile_test_sees():
    """Guards: a table that moves on to tiles whose registers spill, or that no multiprocessor holds."""

    def key(spec):
        _, signature, constants, *_ = spec
        return signature["x_desc"], signature["w_desc"], *map(str, constants.items())

    used = [(tile, gated) for pair in PAIRS for tile, gated in zip(pair, (True, False), strict=True)]
    used = [(tile, gated) for tile, gated in used if isinstance(tile, StreamTile)]
    seen = {key(spec) for spec in fp8_stream.HOPPER_AOT_SPECS}
    assert {key(fp8_stream._aot_spec(*tile_of)) for tile_of in used} == seen
    assert all(tile.stages <= fp8_stream.MAX_STAGES for tile, _ in used)


@pytest.mark.skipif(not HOPPER, reason="Gluon kernels have no interpreter; benchmarks check them too")
@pytest.mark.parametrize("tiles", PAIRS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "expert_range"), [(1, 1, None), (90, 1, None), (700, 1, None), (333, 2, (1, 5))]
)
def test_experts_have_the_bits_of_the_other_kernels(tiles, tokens, top_k, expert_range):
    """Guards: a stage read before it is full or filled before it is read, rows of the next expert, ragged ends."""
    first, count = expert_range or (0, 5)
    hidden, inter = 1088, 1152  # neither a whole number of tiles, 1,088 not of stages either

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda")

    w13 = randn(count, 2 * inter, hidden).to(torch.float8_e4m3fn)
    w2 = randn(count, hidden, inter).to(torch.float8_e4m3fn)
    scales = [torch.rand(count, device="cuda") * 0.1 + 0.05 for _ in range(2)]
    logits = randn(tokens, first + count)
    logits[:, 1] += 1.5  # more rows than a wide tile
    logits[:, 2] -= 50  # none
    ids, scores = moe.route_reference(logits, top_k)
    x = randn(tokens, hidden).to(torch.bfloat16)
    a13, a2 = torch.tensor(0.02, device="cuda"), torch.tensor(0.5, device="cuda")
    arguments = (x, ids, scores, w13, w2, *scales, a13, a2, expert_range)
    assert fp8_stream.can_stream(w13, w2)
    plain = moe.moe_fp8_triton(*arguments, (Tile(64, 64, 128, True, 4, 4), Tile(64, 64, 128, True, 4, 4)))
    out = moe.moe_fp8_triton(*arguments, tiles)
    assert torch.equal(out, plain)
    exact = moe.moe_fp8_reference(*arguments).double()
    assert float((out.double() - exact).norm() / exact.norm()) < 0.03
