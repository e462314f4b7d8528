"""What a rank tells the engine while it loads, seen from the engine's end of its socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.config import EngineConfig
from outrider.runner.worker import Channel, FromRank, Join, Loaded, Loading

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_reports_its_progress(rank: int, tmp_path: Path) -> None:
    """The engine hears rank 0 out first: what another one sends meanwhile would fill its socket and stop it there."""
    ours, theirs = socket.socketpair()
    to_peer, peer = socket.socketpair()
    ours.settimeout(120)
    command = [sys.executable, "-m", "outrider.runner.worker", str(theirs.fileno()), str(os.getpid())]
    fds = [theirs.fileno(), peer.fileno()]
    process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
    with ours, theirs, to_peer, peer:
        theirs.close()
        channel = Channel(ours, FromRank)
        model = str(SHARED / "fixtures" / "llama4-tiny-a" / "fp8")
        config = EngineConfig(model=model, tensor_parallel_size=2, device="cpu", max_model_len=64)
        channel.send(Join(config, rank, 2, str(tmp_path / "store"), {1 - rank: peer.fileno()}))
        messages = []
        while not isinstance(messages[-1] if messages else None, Loaded):
            messages.append(channel.receive())
            assert messages[-1] is not None
        num_reports = sum(isinstance(message, Loading) for message in messages)
        assert len(messages) == num_reports + 1
        assert num_reports > 300 if rank == 0 else num_reports == 0
    process.kill()
    process.wait(30)
