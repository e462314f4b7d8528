"""Random weights made on the device from ``config.json`` alone (``--load-format dummy``). Called by ``registry``.

``DummySource`` says which format each tensor of a real checkpoint would have (the memory plan asks it too);
``fill_random`` writes values that keep activations finite and the router spread over the experts. Never reads
a file. One stream of random numbers per tensor, seeded by its name, so ranks need not talk.
"""

from __future__ import annotations

import zlib

import torch

from outrider.models.config import ModelConfig
from outrider.models.loader import Progress
from outrider.quant.base import WeightBuilder, WeightSlot
from outrider.quant.ignore_list import is_ignored, is_projection

_QUANT_DTYPES = {"FP8": "F8_E4M3", "NVFP4": "U8"}
_E4M3_ONE = 0x38
_E4M3_BELOW_TWO = 0xBF  # keeps the sign and clears the top exponent bit: every mantissa, |value| < 2, no NaN
_E4M3_RMS = 0.598  # root mean square of the e4m3 values left by that mask
_E2M1_RMS = 2.926  # root mean square of the sixteen e2m1 values
_TABLE_ROWS = 8192
_LARGEST_ACTIVATION = 10.0  # amax that a calibration would see behind a norm, with room


class DummySource:
    """The tensors that a checkpoint of this config would have; implements ``quant.base.Source``."""

    def __init__(self, config: ModelConfig) -> None:
        self.quant = config.quant

    def dtype_of(self, name: str) -> str | None:
        """The dtype of ``name`` in a fused-experts checkpoint; None for names it would not have."""
        quant = self.quant
        if name.endswith((".k_scale", ".v_scale")):
            return "F32" if quant and quant.kv_cache_algo else None
        if quant and is_projection(name) and not is_ignored(name.removesuffix(".weight"), quant.ignore):
            return _QUANT_DTYPES[quant.algo]
        return "BF16"


def fill_random(builder: WeightBuilder, config: ModelConfig, progress: Progress | None = None) -> None:
    """Fill every slot on its device, then run what a load would run at its end."""
    total = sum(slot.dest.numel() * slot.dest.element_size() for slot in builder.slots)
    done = 0
    for slot in builder.slots:
        _fill(slot, config.hidden_size**-0.5, builder.device)
        done += slot.dest.numel() * slot.dest.element_size()
        if progress is not None:
            progress(done, total)
    builder.finish()


def _fill(slot: WeightSlot, weight_rms: float, device: torch.device) -> None:
    """Weights of root mean square ``weight_rms`` (so a GEMM keeps the size of its input), sensible scales."""
    dest, name = slot.dest, slot.name
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(f"{name}{slot.select}".encode()))
    if slot.shape == ():
        dest.fill_(_scalar(name, weight_rms))
    elif dest.dtype == torch.float8_e4m3fn and name.endswith("weight_scale"):
        dest.view(torch.uint8).fill_(_E4M3_ONE)
    elif dest.element_size() == 1:
        _random_bytes(dest.view(torch.uint8), generator)
        if dest.dtype == torch.float8_e4m3fn:
            dest.view(torch.uint8).bitwise_and_(_E4M3_BELOW_TWO)
    elif name.endswith(".bias"):
        dest.zero_()
    elif "norm" in name:
        dest.fill_(1.0)
    else:
        # Embeddings of unit size keep tokens apart in the residual stream, and so at the routers.
        rms = 1.0 if name.startswith("embed_tokens") else weight_rms
        if dest.device.type == device.type:
            dest.normal_(0.0, rms, generator=generator)
            return
        for part in dest.split(_TABLE_ROWS):  # a table in host memory
            part.copy_(torch.empty_like(part, device=device).normal_(0.0, rms, generator=generator))


def _random_bytes(dest: torch.Tensor, generator: torch.Generator) -> None:
    """Uniform bytes, eight to a draw where they come in eights: 105 GiB take seconds."""
    if dest.numel() % 8 == 0 and dest.is_contiguous():
        dest.view(-1).view(torch.int64).random_(-(2**63), None, generator=generator)
    else:
        dest.random_(0, 256, generator=generator)


def _scalar(name: str, weight_rms: float) -> float:
    """The value of a one-element tensor, by its suffix."""
    if name.endswith("weight_scale_2"):
        return weight_rms / _E2M1_RMS
    if name.endswith("weight_scale"):
        return weight_rms / _E4M3_RMS
    return _LARGEST_ACTIVATION / 448.0
