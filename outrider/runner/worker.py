"""The process of one rank among several: ``python -m outrider.runner.worker FD PARENT_PID``.

Started by ``workers``; talks only to the engine process, over an inherited Unix socket. It loads its part of the
model, reports its KV budget, waits for the common plan, then runs every step it is sent, in order. The rank that
holds the logits answers with the step's result.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from outrider.config import EngineConfig
from outrider.engine.messages import FrameReader, send_frame
from outrider.engine.process import die_with_parent
from outrider.errors import ConfigError
from outrider.kv_layout import KVLayout
from outrider.logs import setup_logging
from outrider.parallel import Parallel
from outrider.runner.ledger import Ledger
from outrider.runner.mesh import SocketMesh
from outrider.runner.model_runner import LaunchedStep
from outrider.runner.rank import load_rank, start_rank
from outrider.types import StepPlan, StepResult

logger = logging.getLogger("outrider.runner")


class Join(msgspec.Struct, tag="join"):
    """Engine: who you are.

    ``store`` is a file for the rendezvous, so that no port is opened for it; ``peers`` are the inherited sockets to
    the other ranks, by rank.
    """

    config: EngineConfig
    rank: int
    world_size: int
    store: str
    peers: dict[int, int]


class Loading(msgspec.Struct, tag="loading"):
    """Rank 0: bytes of weights read so far."""

    done: int
    total: int


class Loaded(msgspec.Struct, tag="loaded"):
    """Rank: weights are in place; this many bytes are left for the KV cache."""

    kv_budget: int
    block_bytes_per_layer: int
    weight_bytes: int


class Start(msgspec.Struct, tag="start"):
    """Engine: allocate this cache and get ready."""

    groups: tuple[tuple[int, ...], ...]
    local: tuple[bool, ...]
    chunk_size: int | None
    block_size: int
    num_blocks: int
    max_model_len: int


class Started(msgspec.Struct, tag="started"):
    """Rank: steps are welcome."""


class Launch(msgspec.Struct, tag="launch"):
    """Engine: run this step."""

    plan: StepPlan


class Done(msgspec.Struct, tag="done"):
    """Rank: the outcome of a step."""

    result: StepResult


class Failed(msgspec.Struct, tag="failed"):
    """Rank: it cannot go on; ``is_config`` tells that the operator can mend it."""

    message: str
    is_config: bool


ToRank = Join | Start | Launch
FromRank = Loading | Loaded | Started | Done | Failed


class Channel:
    """Whole messages over a blocking socket."""

    def __init__(self, sock: socket.socket, message_type: object) -> None:
        self._sock = sock
        self._reader = FrameReader(message_type)
        self._ready: list[object] = []
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Write one message; threads take turns."""
        with self._sending:
            send_frame(self._sock, message)

    def receive(self) -> object | None:
        """The next message; None when the peer is gone."""
        while not self._ready:
            data = self._sock.recv(1 << 20)
            if not data:
                return None
            self._ready = self._reader.feed(data)
        return self._ready.pop(0)


def join_group(join: Join) -> Parallel:
    """Meet the other ranks and make this one's place among them."""
    config, tp = join.config, join.config.tensor_parallel_size
    pp_rank, tp_rank = divmod(join.rank, tp)
    alone = Parallel(
        tp_rank=tp_rank,
        tp_size=tp,
        pp_rank=pp_rank,
        pp_size=config.pipeline_parallel_size,
        expert_parallel=config.enable_expert_parallel,
    )
    if torch.cuda.is_available() and config.device != "cpu":
        return replace(alone, tp_group=_join_nccl(join, pp_rank))
    group = list(range(pp_rank * tp, (pp_rank + 1) * tp))
    sockets = {rank: socket.socket(fileno=fd) for rank, fd in join.peers.items()}
    return replace(alone, mesh=SocketMesh(join.rank, sockets, group))


def _join_nccl(join: Join, pp_rank: int) -> dist.ProcessGroup | None:
    """The tensor group of this stage over NCCL, whose own sockets stay on the loopback interface."""
    tp = join.config.tensor_parallel_size
    torch.cuda.set_device(join.rank % torch.cuda.device_count())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(join.store, join.world_size),  # type: ignore[attr-defined]
        rank=join.rank,
        world_size=join.world_size,
        timeout=timedelta(minutes=5),
    )
    stages = [
        dist.new_group(list(range(stage * tp, (stage + 1) * tp)))
        for stage in range(join.config.pipeline_parallel_size)
    ]
    group: dist.ProcessGroup | None = stages[pp_rank]
    return group


def _progress(join: Join, channel: Channel) -> Callable[[int, int], None]:
    """Rank 0 reports for all, since the engine hears the ranks out one by one.

    Another rank's reports would fill its socket until it blocks, and the ranks before it would wait for it in their
    first collective.
    """
    if join.rank:
        return lambda done, total: None
    return lambda done, total: channel.send(Loading(done, total))


def serve(channel: Channel) -> None:
    """Load, start, then run steps until the engine goes away."""
    join = channel.receive()
    assert isinstance(join, Join)
    setup_logging(f"Rank{join.rank}")
    clock = Ledger()
    rank = load_rank(join.config, join_group(join), _progress(join, channel), clock)
    one_layer = KVLayout(((0,),), (False,), None, rank.resolved.block_size)
    channel.send(Loaded(rank.kv_budget, rank.block_bytes(one_layer), rank.model.weight_bytes()))
    start = channel.receive()
    assert isinstance(start, Start)
    layout = KVLayout(start.groups, start.local, start.chunk_size, start.block_size)
    runner = start_rank(rank, layout, start.num_blocks, start.max_model_len, clock)
    channel.send(Started())
    reports = rank.parallel.is_last_stage and rank.parallel.tp_rank == 0
    launched: queue.SimpleQueue[LaunchedStep] = queue.SimpleQueue()
    if reports:
        threading.Thread(target=_report, args=(launched, channel, _current_device()), daemon=True).start()
    while (message := channel.receive()) is not None:
        assert isinstance(message, Launch)
        step = runner.launch(message.plan)
        if reports:
            launched.put(step)


def _current_device() -> int | None:
    """The CUDA device of this thread, if any is in use."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _report(launched: queue.SimpleQueue[LaunchedStep], channel: Channel, device: int | None) -> None:
    """Send the outcome of each step when it is there; meanwhile the next one is launched."""
    try:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins on the first one
        while True:
            channel.send(Done(launched.get().wait()))
    except OSError:  # the engine ended
        return
    except Exception as error:
        channel.send(Failed(f"{type(error).__name__}: {error}", False))
        logger.exception("A step failed.")
        os._exit(1)  # the main thread may wait for ever


def main(fd: int, parent_pid: int) -> int:
    """Run the rank; the exit code is 0 when the engine ended first."""
    die_with_parent(parent_pid)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd), ToRank)
    try:
        serve(channel)
    except ConfigError as error:
        channel.send(Failed(str(error), True))
        return 2
    except Exception as error:
        channel.send(Failed(f"{type(error).__name__}: {error}", False))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
