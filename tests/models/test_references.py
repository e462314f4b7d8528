"""Llama 4 in every format against what transformers computed: chunked prefill, then decode, on a paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.kernels.norm import Addend, summed
from outrider.models.decoder import DecoderLayer
from tests.models.paged_driver import PagedDriver, relative_rms
from tests.models.references import PREFILL_CHUNK, Mode, References

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
# Tolerances: those that the fixtures' README suggests, tightened where the arithmetic is the reference's own.
MODES = [
    Mode("bf16_f32", "bf16", F32, F32, 1e-3, 1e-3),
    Mode("bf16_f32", "bf16", BF16, BF16, 0.03, 0.01),
    Mode("fp8_w8a8_kv8", "fp8", F32, FP8, 0.20, 0.03),
    Mode("fp8_w8a8", "fp8", F32, F32, 0.20, 0.03),
    Mode("fp8_w8a8_kv8", "fp8", BF16, FP8, 0.20, 0.03),
    Mode("nvfp4_w4a16", "nvfp4", F32, F32, 1e-3, 1e-3),
    Mode("nvfp4_w4a16_kv8", "nvfp4", F32, FP8, 0.10, 0.01),
    Mode("nvfp4_w4a16_kv8", "nvfp4", BF16, FP8, 0.10, 0.01),
]
IDS = [f"{m.name}-{str(m.dtype).removeprefix('torch.')}" for m in MODES]


class Recorder:
    """Stands before a layer's output and keeps the hidden states that leave it."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer = layer
        self.hidden: list[torch.Tensor] = []

    def __call__(self, *args: Any) -> tuple[Addend, torch.Tensor]:
        """The layer's result, with the sum of both halves kept."""
        x, residual = self.layer(*args)
        self.hidden.append((summed(x) + residual).float())
        return x, residual


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_last_logits(references: References, mode: Mode) -> None:
    """Guards every step of the forward pass, and the cache between the chunks of a prompt."""
    model = references.model(mode.folder, mode.dtype, mode.kv_dtype)
    prompts = list(range(len(references.prompts)))
    assert references.worst_error(model, mode.name, mode.kv_dtype, prompts) <= mode.tolerance


@pytest.mark.parametrize("mode", MODES, ids=IDS)
def test_hidden_states(references: References, mode: Mode) -> None:
    """Guards single layers tightly: later ones re-roll rounding, layer 0 must not."""
    model = references.model(mode.folder, mode.dtype, mode.kv_dtype)
    recorders = {i: Recorder(model.layers[i]) for i in (0, 3)}
    for i, recorder in recorders.items():
        model.layers[i] = recorder  # type: ignore[call-overload]
    PagedDriver(model, kv_dtype=mode.kv_dtype).prefill(references.prompts[3], PREFILL_CHUNK)
    tolerances = {0: mode.hidden_tolerance, 3: mode.tolerance}
    for i, recorder in recorders.items():
        wanted = references.tensor(f"{mode.name}/p3/hidden_after_layer{i}")
        assert relative_rms(torch.cat(recorder.hidden), wanted) <= tolerances[i]


@pytest.mark.parametrize("mode", [MODES[0], MODES[5]], ids=[IDS[0], IDS[5]])
@pytest.mark.parametrize("prompt", [0, 3, 5])
def test_greedy_ids(references: References, mode: Mode, prompt: int) -> None:
    """Guards decode: 24 greedy ids equal the reference's up to its first margin below 0.01."""
    model = references.model(mode.folder, mode.dtype, mode.kv_dtype)
    driver = PagedDriver(model, kv_dtype=mode.kv_dtype)
    found = driver.greedy(driver.prefill(references.prompts[prompt], PREFILL_CHUNK), 24)
    wanted = references.values["modes"][mode.name][prompt]
    sure = next((i for i, gap in enumerate(wanted["greedy_margins"]) if gap < 0.01), 24)
    assert sure > 0
    assert found[:sure] == wanted["greedy"][:sure]


def test_mixed_batch(references: References) -> None:
    """Guards the batch's bookkeeping: a decode beside two prefills gives what each gives alone."""
    model = references.model("bf16", F32)
    prompts = [references.prompts[i] for i in (1, 3, 4)]
    driver = PagedDriver(model, num_seqs=3)
    driver.prefill(prompts[0][:-1], 5, seq=0)
    together = driver.step([(0, prompts[0][-1:]), (1, prompts[1]), (2, prompts[2])])
    for row, index in enumerate((1, 3, 4)):
        assert relative_rms(together[row], references.tensor(f"bf16_f32/p{index}/last_logits")) < 1e-3


def test_prompt_logprobs(references: References) -> None:
    """Guards the logits of inner positions, which the last logits do not show."""
    model = references.model("bf16", F32)
    ids = references.prompts[4]
    driver = PagedDriver(model)
    logits = model.logits(model.forward(driver.batch([(0, ids)]), driver.kv)).float()
    found = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, references.tensor("bf16_f32/p4/prompt_logprobs"), atol=1e-3, rtol=0)
