"""Steps with so many rows that the feed-forward parts take some at a time."""

from __future__ import annotations

import pytest
import torch

from outrider.models import decoder
from tests.models.references import References


@pytest.mark.parametrize(("folder", "mode"), [("bf16", "bf16_f32"), ("nvfp4", "nvfp4_w4a16")])
def test_rows_in_parts_are_those_of_the_reference(
    references: References, monkeypatch: pytest.MonkeyPatch, folder: str, mode: str
) -> None:
    """Guards: a part that reads or replaces another's rows, and a residual that is added twice."""
    monkeypatch.setattr(decoder, "MOST_ROWS", 3)
    model = references.model(folder, torch.float32)
    assert len(references.prompts[5]) > 3
    assert references.worst_error(model, mode, torch.float32, [5]) <= 1e-3
