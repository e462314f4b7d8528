"""NVFP4 on GPUs without FP4 tensor cores: dense weights as FP8 rows, experts reordered and decoded to FP8."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import exact_casts  # noqa: F401
import pytest
import torch
from test_nvfp4 import DEVICE, GPU, WIDE, decode_slowly, error, random_weights

from outrider.kernels import moe, nvfp4, nvfp4_stream
from outrider.kernels.moe_nvfp4 import STREAM_TILES, moe_nvfp4_repacked
from outrider.kernels.nvfp4_decode import block_ptx
from outrider.kernels.nvfp4_repack import can_repack, quantize_stream, repack_nvfp4_, unpack_reference
from outrider.kernels.nvfp4_stream import StreamTile
from outrider.kernels.quantize import quantize_fp8_rowwise

ONE = torch.tensor(1.0, device=DEVICE)


def repacked(packed: torch.Tensor, scale: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    packed, scale = packed.clone(), scale.clone()
    repack_nvfp4_(packed, scale, gated)
    return packed, scale


def unpacked(packed: torch.Tensor, scale: torch.Tensor, gated: bool) -> torch.Tensor:
    """The values of one repacked matrix."""
    codes, scales = repacked(packed, scale, gated)
    return unpack_reference(codes[0], scales[0], gated).double()


@pytest.mark.parametrize("gated", [False, True])
def test_reordered_weights_keep_their_values(gated):
    """Guards: any slip of a code, a sign, a scale or a row."""
    packed, scale, _ = random_weights(1, 128, 1024)
    assert torch.equal(unpacked(packed, scale, gated), decode_slowly(packed, scale, ONE)[0])


def test_scale_codes_say_how_half_steps_round():
    """Guards: 1.5, 3 or 6 times a scale rounded the wrong way; every scale that weights are kept with."""
    packed, scale, _ = random_weights(1, 64, 1024)
    codes = torch.arange(40, 0x7F, device=DEVICE, dtype=torch.uint8)
    scale.view(torch.uint8).flatten()[: 2 * len(codes)] = codes.repeat(2)
    _, kept = repacked(packed, scale, False)
    kept = kept.view(torch.uint8).int()
    half = ((kept & 127) + 32).to(torch.uint8).view(
        torch.float8_e4m3fn
    ).float() / 16  # of a block's scale / 8
    rounded = (3 * half).to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert torch.equal(rounded, (kept & 127) + 12 + (kept >> 7))


def test_blocks_with_tiny_scales_keep_their_values():
    """Guards: scale codes that wrap around below 1/4; the error is then at most half a step of scale 1/4."""
    packed, _, _ = random_weights(1, 64, 512)
    scale = torch.exp2(torch.rand(1, 64, 32, device=DEVICE) * 17.5 - 9).to(torch.float8_e4m3fn)
    scale[0, 0, :4] = 0.0
    exact = decode_slowly(packed, scale, ONE)[0]
    found = unpacked(packed, scale, False)
    assert ((found - exact).abs() <= torch.where(exact.abs() < 0.5, 0.0625, 0.25)).all()
    assert (found[0, :64] == 0).all()
    large = (scale[0].float() >= 0.25).repeat_interleave(16, dim=-1)
    assert torch.equal(found[large], exact[large])


def run_ptx(text: str, registers: dict[str, int]) -> dict[str, int]:
    """What the few instructions of ``block_ptx`` leave in the registers."""

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for operation, operands in re.findall(r"(prmt|mad\.lo|and|lop3|shr|shl)\S* ([^;{}]+);", text):
        target, *names = [operand.strip() for operand in operands.split(",")]
        a, b, *rest = map(value, names)
        if operation == "prmt":
            source = (b << 32 | a).to_bytes(8, "little")
            result = sum(source[rest[0] >> 4 * i & 7] << 8 * i for i in range(4))
        elif operation == "lop3":
            bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | rest[0] >> i & 1 for i in range(32)]
            result = sum((rest[1] >> bit & 1) << i for i, bit in enumerate(bits))
        else:
            result = {"mad.lo": a * b + sum(rest), "and": a & b, "shr": a >> b, "shl": a << b}[operation]
        registers[target] = result & 0xFFFFFFFF
    return registers


def test_the_assembly_looks_up_every_code():
    """Guards: a carry into the wrong byte of the table, a sign from the wrong bit; every scale, code and sign."""
    names = ("%w0", "%w1"), ("%o0", "%o1", "%o2", "%o3")
    for scale in range(40 - 32, 0x7E - 32 + 1):
        for up in (0, 1):
            codes = random.sample([*range(16)], 16)
            words = [0, 0]
            for place, code in enumerate(codes):
                i = place % 8
                sign_at = 8 * i + 7 if i < 4 else 8 * i - 29
                words[place // 8] |= (code & 7) << 4 * i | (code >> 3) << sign_at
            scales = random.getrandbits(32) & ~0xFF00 | (scale | up << 7) << 8
            start = {"%s": scales, names[0][0]: words[0], names[0][1]: words[1]}
            end = run_ptx(block_ptx("%s", 1, *names), start)
            found = [end[name] >> 8 * i & 255 for name in names[1] for i in range(4)]
            steps = (0, 0, 8, 12 + up, 16, 20 + up, 24, 28 + up)
            assert found == [(c >> 3) << 7 | (scale + steps[c & 7] if c & 7 else 0) for c in codes]


def test_activations_follow_the_order_of_the_weights():
    """Guards: a lane that multiplies a weight with its neighbour's activation.

    A lane of a quad holds blocks 4 lane ... 4 lane + 3 of a half chunk, and four neighbours in a register.
    """
    x = torch.zeros(1, 1024, device=DEVICE, dtype=WIDE)
    places = []
    for feature in (0, 5, 17, 64, 255, 256, 700):
        x.zero_()
        x[0, feature] = 1.0
        codes, _ = quantize_stream(x)
        places.append(int(codes[0].float().argmax()))
    assert places == [
        512 * (f // 512)
        + 32 * (4 * (f // 16 % 4) + f // 4 % 4)
        + f % 512 // 256 * 16
        + f // 64 % 4 * 4
        + f % 4
        for f in (0, 5, 17, 64, 255, 256, 700)
    ]


def test_dense_rows_are_nearer_than_four_bit_activations():
    """Guards: row scales of another part, and noise beyond two e4m3 roundings."""
    packed, scale, _ = random_weights(48, 1024)
    global_scale = torch.cat([torch.full((16,), 0.003), torch.full((32,), 0.001)]).to(DEVICE)
    x = torch.randn(6, 1024, device=DEVICE, dtype=WIDE)
    out = nvfp4.fp8_rows_linear(x, *nvfp4.nvfp4_to_fp8_rows(packed, scale, global_scale), WIDE)
    exact = x.double() @ (decode_slowly(packed, scale, ONE) * global_scale.double()[:, None]).T
    assert error(out, exact) < 0.05


@pytest.mark.parametrize("rows", [6, 130])
def test_rows_leave_their_scales_to_the_reader(rows):
    """Guards: the scale of the weights left out too, of rows taken twice or of others; the same bits on a CPU."""
    packed, scale, _ = random_weights(48, 1024)
    weight = nvfp4.nvfp4_to_fp8_rows(packed, scale, 0.003 * ONE)
    sizes = torch.exp2(4.0 * (torch.arange(rows, device=DEVICE) % 3)).to(WIDE)
    x = torch.randn(rows, 1024, device=DEVICE, dtype=WIDE) * sizes[:, None]
    expected = nvfp4.fp8_rows_linear(x, *weight, WIDE)
    for operand in (x, quantize_fp8_rowwise(x)):
        out = nvfp4.fp8_rows_unscaled(operand, *weight, WIDE)
        assert out.shape == expected.shape and len(out.scale.unique()) > 1
        assert error(out.tensor(), expected.double()) < (3e-3 if GPU else 1e-30)
    assert torch.equal(out[torch.tensor([4, 1], device=DEVICE)].tensor(), out.tensor()[[4, 1]])


def test_which_matrices_divide_into_tiles():
    """Guards: a tensor-parallel shard that the tiles would cut."""
    assert can_repack(16384, 5120, gated=True) and can_repack(5120, 8192, gated=False)
    assert not can_repack(64, 512, gated=True) and not can_repack(64, 768, gated=False)


def test_the_tiles_in_use_are_those_that_the_compile_test_sees():
    """Guards: a table that moves on to tiles whose registers spill, or whose products wait for one another."""

    def key(spec):
        _, signature, constants, options, _ = spec
        boxes = signature["wide_desc"], signature["narrow_desc"]
        return *boxes, constants["STAGES"], constants["SPLIT_K"], *options.items()

    seen = {key(spec) for spec in nvfp4_stream.HOPPER_AOT_SPECS}
    used = {key(nvfp4_stream._aot_spec(tile, False)) for _, *tiles in STREAM_TILES for tile in tiles}
    assert used <= seen


@pytest.mark.skipif(not GPU, reason="Gluon kernels have no interpreter; benchmarks check them too")
@pytest.mark.parametrize("tokens", [1, 37, 300, 2000])
@pytest.mark.parametrize(
    "tiles",
    [
        None,
        (StreamTile(16, 32, 4, 3, 4), StreamTile(16, 16, 8, 3, 2, split_k=2)),
        (StreamTile(32, 64, 8, 3, 2), StreamTile(64, 128, 8, 4, 1)),
    ],
)
@pytest.mark.parametrize("expert_range", [None, (2, 4)])
def test_experts_streamed_as_fp8(tokens, tiles, expert_range):
    """Guards: ragged groups, rows of other ranks, split depth, gate and up mixed up."""
    up, down = random_weights(4, 1024, 1024), random_weights(4, 1024, 512)
    x = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16) * 0.03
    ids, scores = moe.route_reference(torch.randn(tokens, 4 if expert_range is None else 8, device=DEVICE), 1)
    ids[0, 0] = expert_range[0] if expert_range else 0  # at least one row is this rank's
    exact = moe.moe_nvfp4_reference(x, ids, scores, *up, *down, expert_range)
    weights = (*repacked(*up[:2], True), up[2], *repacked(*down[:2], False), down[2])
    out = moe_nvfp4_repacked(x, ids, scores, *weights, expert_range, tiles)
    assert error(out, exact.double()) < 0.09


@pytest.mark.skipif(not GPU, reason="Gluon kernels have no interpreter; benchmarks check them too")
@pytest.mark.parametrize(
    "tile", sorted({tile for _, *pair in STREAM_TILES for tile in pair}, key=str), ids=str
)
def test_every_tile_gives_the_same_bits(tile):
    """Guards: a stage or scales refilled while they are read, registers reused under a running product, rows of the
    next expert; experts without rows, and with as many as a tile, one fewer and one more, large beside small."""
    up, down = random_weights(8, 1024, 5120), random_weights(8, 5120, 512)
    weights = (*repacked(*up[:2], True), up[2], *repacked(*down[:2], False), down[2])
    small = StreamTile(16, 16, 4, 3, 4)
    for sizes in (
        [0, 65, 1, 300, 16, 64, 17, 63],
        [129, 0, 33, 2, 128, 31, 127, 32],
        [0, 0, 7, 0, 0, 0, 1, 0],
    ):
        tokens = sum(sizes)
        ids = torch.arange(8).repeat_interleave(torch.tensor(sizes))[torch.randperm(tokens)]
        ids, scores = ids.int()[:, None].to(DEVICE), torch.ones(tokens, 1, device=DEVICE)
        x = torch.randn(tokens, 5120, device=DEVICE, dtype=torch.bfloat16) * 0.03
        pairs = [(small, replace(small, split_k=tile.split_k)), (replace(tile, split_k=1), tile)]
        expected, *outs = [moe_nvfp4_repacked(x, ids, scores, *weights, None, pairs[i]) for i in (0, 1, 1, 1)]
        assert expected.isfinite().all() and all(torch.equal(out, expected) for out in outs)
