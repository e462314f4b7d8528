"""The few-rows form of a MoE layer, wired to a loaded checkpoint, against the layer's separate operations."""

from __future__ import annotations

import torch

from outrider.kernels.norm import Normed, rms_norm, summed
from outrider.models.moe import MoE
from tests.models.references import References


def test_few_rows_form_equals_the_layer(references: References) -> None:
    """Guards the wiring: two scales exchanged, another expert's weights, scores or the shared expert left out."""
    model = references.model("fp8", torch.float32)
    layers = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, MoE)]
    assert layers
    for layer in layers:
        x, norm = torch.randn(9, model.config.hidden_size), torch.randn(model.config.hidden_size)
        assert layer.few_rows is not None
        residual, again = torch.randn(2, *x.shape).unbind()
        again.copy_(residual)
        expected = summed(layer(Normed(rms_norm(x, norm, 1e-3, residual).y, None)))
        out = layer.few_rows(x, again, norm, 1e-3)
        assert torch.equal(again, residual)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_other_formats_keep_their_separate_operations_on_a_cpu(references: References) -> None:
    """Guards: a layer of another format sent through FP8 kernels; NVFP4 in an order that it has on Hopper alone."""
    for folder in ("bf16", "nvfp4"):
        for layer in references.model(folder, torch.float32).layers:
            few = getattr(layer.feed_forward, "few_rows", None)
            assert few is None or (folder == "nvfp4" and not few.takes(torch.empty(1, 64)))
