"""What the launchers share."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from outrider.kernels import beside
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


def test_work_beside_runs_in_the_second_lane(monkeypatch):
    """Guards the use of it, and many rows that run at once: streams are pretended, the lane is the real one."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(beside, "_second_stream", lambda device: mock.MagicMock())
    x = mock.MagicMock(is_cuda=True)
    for num_rows, is_beside in ((beside.MOST_ROWS, True), (beside.MOST_ROWS + 1, False)):
        x.__len__.return_value = num_rows
        join = beside.run_beside(lambda: arrival_counters(CPU), x)
        assert (join().data_ptr() != arrival_counters(CPU).data_ptr()) is is_beside
