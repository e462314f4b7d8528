"""What the launchers share."""

from __future__ import annotations

import pytest
import torch

from outrider.kernels._dispatch import arrival_counters, second_lane

CPU = torch.device("cpu")


def test_kernels_that_run_beside_others_count_apart():
    """Guards: two split products at the same time that end each other's sums, one layer in many thousands."""
    first = arrival_counters(CPU)
    with second_lane():
        second = arrival_counters(CPU)
    assert arrival_counters(CPU).data_ptr() == first.data_ptr()
    assert second.data_ptr() >= first.data_ptr() + first.nbytes
    with pytest.raises(KeyError), second_lane():
        raise KeyError
    assert arrival_counters(CPU).data_ptr() == first.data_ptr()
