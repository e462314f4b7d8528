"""The MoE layer of one token with NVFP4 experts, and the parts of its kernels, against plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import exact_casts  # noqa: F401
import pytest
import torch
from test_nvfp4 import DEVICE, GPU, WIDE, decode_slowly, error, random_weights

from outrider.kernels import gemm, moe_one_nvfp4, nvfp4
from outrider.kernels.moe import moe_nvfp4_reference, route_reference
from outrider.kernels.moe_few import NormWeights
from outrider.kernels.moe_one_nvfp4 import (
    Nvfp4ExpertWeights,
    OneTile,
    SharedRows,
    moe_one_reference,
    moe_one_triton,
)
from outrider.kernels.norm import rms_norm_reference
from outrider.kernels.nvfp4_repack import repack_nvfp4_, unpack_reference
from outrider.kernels.nvfp4_row import half_place, half_scale_place
from outrider.quant import few_rows

LIMIT = 6e-3 if GPU else 1e-3
"""On a GPU the model dtype is bfloat16, of which half blocks lose nothing; of float32 they keep eleven bits."""


LARGE = OneTile(64, 4)
"""Few programs, for the interpreter."""


def make_layer(experts, expert_range, hidden, inter, shared_inter):
    """Random weights: ``(router, experts, shared)``, and the routed experts' in the checkpoint's order."""
    local = expert_range[1]
    up, down = random_weights(local, 2 * inter, hidden), random_weights(local, hidden, inter)
    w13, w13_scale, w2, w2_scale = (t.clone() for t in (*up[:2], *down[:2]))
    repack_nvfp4_(w13, w13_scale, gated=True)
    repack_nvfp4_(w2, w2_scale, gated=False)
    tiny = torch.tensor(3e-5, device=DEVICE)
    routed = Nvfp4ExpertWeights(w13, w13_scale, tiny, w2, w2_scale, tiny * 2, expert_range)

    def rows(*shape):
        scale = torch.rand(shape[0], device=DEVICE) * 0.02 + 0.01
        return torch.randn(shape, device=DEVICE).to(torch.float8_e4m3fn), scale

    shared = SharedRows(*rows(2 * shared_inter, hidden), *rows(hidden, shared_inter))
    router = torch.randn(experts, hidden, device=DEVICE).to(WIDE)
    return router, routed, shared, ((*up[:2], tiny), (*down[:2], tiny * 2))


@pytest.mark.parametrize("gated", [False, True])
def test_unpacking_in_plain_torch(gated):
    """Guards the reference itself: any slip of a code, a sign, a scale or a row."""
    packed, scale, _ = random_weights(1, 128, 1024)
    exact = decode_slowly(packed, scale, torch.ones((), device=DEVICE))
    repack_nvfp4_(packed, scale, gated)
    assert torch.equal(unpack_reference(packed[0], scale[0], gated).double(), exact[0])


def test_every_feature_has_a_place_of_its_own():
    """Guards: half blocks or their scales written over one another, or over another chunk."""
    k = torch.arange(1536)
    assert torch.equal(half_place.fn(k).sort().values, k)
    assert torch.equal(half_scale_place.fn(k[:96]).sort().values, k[:96])
    assert torch.equal(half_place.fn(k) // 512, k // 512)


@pytest.mark.parametrize(
    ("tile", "experts", "expert_range", "hidden", "inter", "shared_inter"),
    [
        (OneTile(64, 2, 3, 4, 8), 4, (0, 4), 512, 512, 512),
        (OneTile(16, 4, 0, 8, 2), 5, (1, 3), 1024, 512, 512),
        (OneTile(32, 2, 99, 2, 4), 2, (0, 2), 512, 1536, 1024),
        pytest.param(None, 3, (0, 3), 1024, 1536, 1536, marks=pytest.mark.slow),
        pytest.param(
            None, 16, (0, 16), 5120, 8192, 8192, marks=pytest.mark.skipif(not GPU, reason="Scout's size")
        ),
    ],
)
def test_one_token(tile, experts, expert_range, hidden, inter, shared_inter):
    """Guards: another expert's weights, a block that meets another's scale or input, chunks or columns left out."""
    router, routed, shared, _ = make_layer(experts, expert_range, hidden, inter, shared_inter)
    norm = NormWeights(torch.randn(hidden, device=DEVICE).to(WIDE), 1e-2)
    for _ in range(3 if GPU else 1):
        x, residual = torch.randn(2, 1, hidden, device=DEVICE).to(WIDE).unbind()
        summed = residual.clone()
        expected = moe_one_reference(x, summed, norm, router, routed, shared)
        out = moe_one_triton(x, residual, norm, router, routed, shared, tile)
        assert torch.equal(residual, summed)
        assert error(out, expected.double()) < LIMIT


def test_an_expert_of_another_rank_adds_nothing():
    """Guards: weights read before the first expert, and rows of hidden values that nobody wrote."""
    router, routed, shared, _ = make_layer(4, (1, 2), 512, 512, 512)
    norm = NormWeights(torch.ones(512, device=DEVICE).to(WIDE), 1e-5)
    seen = set()
    for _ in range(20):
        x = torch.randn(1, 512, device=DEVICE).to(WIDE)
        ids = route_reference(rms_norm_reference(x, *norm).y @ router.T, 1)[0]
        if int(ids) in seen or len(seen) == 3:
            continue
        seen.add(int(ids))
        expected = moe_one_reference(x, torch.zeros_like(x), norm, router, routed, shared)
        out = moe_one_triton(x, torch.zeros_like(x), norm, router, routed, shared, LARGE)
        assert error(out, expected.double()) < LIMIT
    assert seen & {0, 3} and seen & {1, 2}


def test_the_reference_is_the_layer_with_exact_weights():
    """Guards the reference: the score at the wrong place, a scale left out, gate and up exchanged."""
    router, routed, shared, (up, down) = make_layer(4, (0, 4), 512, 512, 512)
    norm = NormWeights(torch.randn(512, device=DEVICE).to(WIDE), 1e-5)
    x, residual = torch.randn(2, 1, 512, device=DEVICE).to(WIDE).unbind()
    y = rms_norm_reference(x, *norm, residual.clone()).y
    routed_part = moe_nvfp4_reference(y, *route_reference(y @ router.T, 1), *up, *down).double()
    gate, up_part = (y.double() @ (shared.gate_up.double() * shared.gate_up_scale.double()[:, None]).T).chunk(
        2, -1
    )
    hidden = torch.nn.functional.silu(gate) * up_part
    exact = hidden @ (shared.down.double() * shared.down_scale.double()[:, None]).T + routed_part
    assert error(moe_one_reference(x, residual, norm, router, routed, shared), exact) < (
        1e-2 if GPU else 1e-5
    )


@pytest.mark.parametrize("largest", [pytest.param(1e-8, marks=pytest.mark.slow), 1e9])
def test_sums_of_a_block_never_overflow(largest):
    """Guards: float16 sums of large hidden values; a row with one value far above the others."""
    router, routed, shared, _ = make_layer(1, (0, 1), 512, 512, 512)
    norm = NormWeights((torch.ones(512, device=DEVICE) * largest).to(WIDE), 1e-5)
    x = torch.randn(1, 512, device=DEVICE).to(WIDE)
    x[0, 100] = 300.0
    router.zero_()  # a score of one half
    expected = moe_one_reference(x, torch.zeros_like(x), norm, router, routed, shared)
    out = moe_one_triton(x, torch.zeros_like(x), norm, router, routed, shared, LARGE)
    assert bool(expected.isfinite().all()) and error(out, expected.double()) < LIMIT


def test_a_lone_row_is_not_rounded(monkeypatch):
    """Guards: a single row of a dense layer rounded to e4m3 on a GPU, or several taken for one."""
    weight, scale = torch.randn(70, 512, device=DEVICE).to(torch.float8_e4m3fn), torch.rand(70, device=DEVICE)
    x = torch.randn(2, 512, device=DEVICE).to(WIDE)
    exact = x.double() @ weight.double().T * scale.double()
    rounded = nvfp4.fp8_rows_linear(x, weight, scale, WIDE)
    assert nvfp4.fp8_rows_form(2, weight) is not None
    monkeypatch.setattr(gemm, "on_gpu", lambda _: True)  # the interpreter runs the kernel
    assert nvfp4.fp8_rows_form(1, weight) is None
    assert error(nvfp4.fp8_rows_linear(x[:1], weight, scale, WIDE), exact[:1]) < (4e-3 if GPU else 1e-6)
    assert 1e-2 < error(rounded, exact) < 5e-2


def test_layers_hand_their_weights_over(monkeypatch):
    """Guards the wiring: scales or projections exchanged, more rows than one taken, or a deterministic run's."""
    router, routed, shared, _ = make_layer(3, (0, 3), 512, 512, 512)
    experts = SimpleNamespace(
        w13=routed.w13, w13_block_scale=routed.w13_block_scale,
        w2=routed.w2, w2_block_scale=routed.w2_block_scale,
        scales=torch.stack((routed.w13_scale, routed.w2_scale)), expert_range=(0, 3), repacked=True,
    )  # fmt: skip
    gate_up = SimpleNamespace(fp8_rows=(shared.gate_up, shared.gate_up_scale))
    down = SimpleNamespace(fp8_rows=(shared.down, shared.down_scale))
    layer = few_rows.Nvfp4OneRow(router, experts, gate_up, down)
    monkeypatch.setattr(few_rows, "moe_one", moe_one_reference)
    x, norm = torch.randn(1, 512, device=DEVICE).to(WIDE), torch.rand(512, device=DEVICE).to(WIDE)
    args = (x, torch.randn_like(x))
    expected = moe_one_reference(args[0], args[1].clone(), NormWeights(norm, 1e-5), router, routed, shared)
    assert torch.equal(layer(*args, norm, 1e-5), expected)

    def takes(rows):
        return layer.takes(SimpleNamespace(is_cuda=True, shape=(rows, 512)))

    assert takes(1) and not takes(2)
    monkeypatch.setattr(few_rows, "is_invariant", lambda: True)
    assert not takes(1)


def test_the_table_is_used(monkeypatch):
    """Guards: constants that the launcher ignores."""
    router, routed, shared, _ = make_layer(1, (0, 1), 512, 512, 512)
    norm = NormWeights(torch.ones(512, device=DEVICE).to(WIDE), 1e-5)
    x = torch.randn(1, 512, device=DEVICE).to(WIDE)
    monkeypatch.setattr(moe_one_nvfp4, "ONE_TILE", OneTile(outputs=3))  # no power of two
    with pytest.raises(Exception, match="power of 2"):
        moe_one_triton(x, torch.zeros_like(x), norm, router, routed, shared)
