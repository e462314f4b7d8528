"""Norms and activations that write what the next product reads: the same bits as products that do it themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider.kernels.norm import LazySum, Normed
from outrider.kernels.nvfp4 import Nvfp4Path
from outrider.kernels.quantize import Fp8Rows, ScaledRows
from outrider.parallel import Parallel
from outrider.quant import linear
from outrider.quant.experts import ExpertShape
from outrider.quant.linear import Fp8Linear, Nvfp4Linear
from tests.models.paged_driver import PagedDriver
from tests.models.references import References


@pytest.mark.parametrize(
    ("folder", "layer", "in_form"), [("nvfp4", Nvfp4Linear, 0.75), ("fp8", Fp8Linear, 1.0)]
)
def test_forms_change_no_bit(
    references: References, monkeypatch: pytest.MonkeyPatch, folder: str, layer: type, in_form: float
) -> None:
    """Guards the wiring: another product's scale, rows that a product does not want, or a form that nobody makes.

    NVFP4 as on Hopper, where dense layers are e4m3 rows; attention alone, which sees no whole row, leaves that to o.
    """
    monkeypatch.setattr(linear, "nvfp4_path", lambda _: Nvfp4Path.FP8)
    model = references.model(folder, torch.float32)
    handed_over: list[bool] = []
    product = layer.__call__

    def watched(self: object, x: object) -> torch.Tensor:
        handed_over.append(isinstance(x, Fp8Rows))
        return product(self, x)

    monkeypatch.setattr(layer, "__call__", watched)
    expected = PagedDriver(model).prefill(references.prompts[4], 70)
    assert sum(handed_over) == in_form * len(handed_over) > 0
    handed_over.clear()
    monkeypatch.setattr(layer, "input_form", lambda *_: None)
    out = PagedDriver(model).prefill(references.prompts[4], 70)
    assert handed_over and not any(handed_over)
    assert bool(out.isfinite().all()) and torch.equal(out, expected)


def test_rows_without_their_scales_change_no_bit(
    references: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the wiring: a reader that takes no scale, rows chosen without theirs, a sum or a bias of unscaled rows."""
    monkeypatch.setattr(linear, "nvfp4_path", lambda _: Nvfp4Path.FP8)
    model = references.model("nvfp4", torch.float32)

    def states() -> torch.Tensor:
        driver = PagedDriver(model)
        ids = references.prompts[4]
        driver.prefill(ids[:-9], 70)
        batch = driver.batch([(0, ids[-9:])])
        return model.forward(replace(batch, output_rows=torch.tensor([8, 3])), driver.kv)

    expected, given = states(), []
    product = linear.fp8_rows_unscaled

    def watched(*args: Any) -> ScaledRows:
        given.append(product(*args))
        return given[-1]

    monkeypatch.setattr(linear, "fp8_rows_unscaled", watched)
    monkeypatch.setattr(linear, "one_scale_is_faster", lambda *_: True)
    assert torch.equal(states(), expected)
    widths = {rows.shape[1] for rows in given}
    attention = model.layers[0].attention
    assert isinstance(attention.qkv, Nvfp4Linear) and attention.qkv.fp8_rows is not None
    assert widths == {model.config.hidden_size, len(attention.qkv.fp8_rows[0])}
    assert min(float(rows.scale.max()) for rows in given) < 1 and all(len(rows.scale) for rows in given)
    given.clear()
    attention.qkv.can_leave_scales = False
    assert torch.equal(states(), expected)


def test_ranks_add_up_scaled_rows(references: References, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: rows of ranks added up before their scales, which differ."""
    monkeypatch.setattr(linear, "nvfp4_path", lambda _: Nvfp4Path.FP8)
    monkeypatch.setattr(linear, "one_scale_is_faster", lambda *_: True)
    for size in (1, 2):
        model = references.model("nvfp4", torch.float32, parallel=Parallel(tp_rank=size - 1, tp_size=size))
        x = torch.randn(9, model.config.hidden_size)
        out = model.layers[0].feed_forward(Normed(x, None))
        assert isinstance(out, LazySum) and isinstance(out.a, ScaledRows if size == 1 else torch.Tensor)


def test_one_scale_is_that_of_all_parts(references: References) -> None:
    """Guards: the first part's scale taken for parts that have others, or none found where all share one."""
    found = []
    for layer in references.model("fp8", torch.float32).layers:
        for product in (layer.attention.qkv, layer.attention.o):
            assert isinstance(product, Fp8Linear)
            scales = product.product_scale
            found.append(product.one_scale is not None)
            assert found[-1] == bool((scales == scales[0]).all())
            assert product.one_scale is None or torch.equal(product.one_scale, scales[:1])
    assert True in found and False in found


def test_who_may_leave_rows_to_other_ranks() -> None:
    """Guards: rows zeroed for nobody, or left as memory was where another rank's expert was chosen."""
    assert ExpertShape(4, (0, 4), 64, 64, (0, 64)).some_experts is None
    assert ExpertShape(4, (0, 2), 64, 64, (0, 64)).some_experts == (0, 2)
    assert ExpertShape(4, (2, 2), 64, 64, (0, 64)).some_experts == (2, 2)
