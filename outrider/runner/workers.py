"""Several ranks: one process each, all sent the same plans. Implements ``engine.executor.Executor``.

Called by ``setup`` when tensor or pipeline parallelism is on. The engine process itself holds no model then.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from outrider.config import EngineConfig
from outrider.engine.messages import encode_frame
from outrider.errors import ConfigError, EngineError
from outrider.kv_layout import KVLayout
from outrider.runner.worker import (
    Channel,
    Done,
    Failed,
    FromRank,
    Join,
    Launch,
    Loaded,
    Loading,
    Start,
    Started,
)
from outrider.types import StepPlan, StepResult


class _RankProcess:
    """A worker process and the channel to it."""

    def __init__(
        self, config: EngineConfig, rank: int, world_size: int, store: str, peers: dict[int, int]
    ) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "outrider.runner.worker", str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno(), *peers.values()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.sock = ours
        self._channel = Channel(ours, FromRank)
        self._channel.send(Join(config, rank, world_size, store, peers))

    def receive(self) -> object:
        """The next message; a failure of the rank is raised here."""
        message = self._channel.receive()
        if message is None:
            raise EngineError("A rank's process ended; the log above says why.")
        if isinstance(message, Failed):
            raise ConfigError(message.message) if message.is_config else EngineError(message.message)
        return message

    def send(self, message: object) -> None:
        """Write one message to the rank."""
        self._channel.send(message)


def _peers(pairs: dict[tuple[int, int], tuple[socket.socket, socket.socket]], rank: int) -> dict[int, int]:
    """Descriptors of ``rank``'s end of its sockets, by the rank at the other end."""
    lower = {b: ends[0].fileno() for (a, b), ends in pairs.items() if a == rank}
    return lower | {a: ends[1].fileno() for (a, b), ends in pairs.items() if b == rank}


class WorkersHandle:
    """A step under way on all ranks."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def wait(self) -> StepResult:
        """Block until the reporting rank has answered; handles are waited for in launch order."""
        return self._workers.next_result()


class Workers:
    """The rank processes of one model, from spawn to shutdown."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[int, int], None]) -> None:
        world_size = config.tensor_parallel_size * config.pipeline_parallel_size
        self._folder = tempfile.TemporaryDirectory(prefix="outrider-")
        store = str(Path(self._folder.name) / "store")
        pairs = {pair: socket.socketpair() for pair in itertools.combinations(range(world_size), 2)}
        self._ranks = [
            _RankProcess(config, rank, world_size, store, _peers(pairs, rank)) for rank in range(world_size)
        ]
        for one, other in pairs.values():
            one.close()
            other.close()
        self._reporter = self._ranks[-config.tensor_parallel_size]
        self.loaded = [self._await_loaded(rank, on_progress) for rank in self._ranks]

    @staticmethod
    def _await_loaded(rank: _RankProcess, on_progress: Callable[[int, int], None]) -> Loaded:
        while True:
            message = rank.receive()
            if isinstance(message, Loaded):
                return message
            if isinstance(message, Loading):
                on_progress(message.done, message.total)

    def start(self, layout: KVLayout, num_blocks: int, max_model_len: int) -> None:
        """Every rank allocates the same cache."""
        message = Start(
            layout.groups, layout.local, layout.chunk_size, layout.block_size, num_blocks, max_model_len
        )
        for rank in self._ranks:
            rank.send(message)
        for rank in self._ranks:
            assert isinstance(rank.receive(), Started)

    def launch(self, plan: StepPlan) -> WorkersHandle:
        """Send the plan to every rank, encoded once."""
        frame = encode_frame(Launch(plan))
        for rank in self._ranks:
            rank.sock.sendall(frame)
        return WorkersHandle(self)

    def next_result(self) -> StepResult:
        """The oldest result that has not been read."""
        message = self._reporter.receive()
        assert isinstance(message, Done)
        return message.result

    def shutdown(self) -> None:
        """End the ranks; their sockets reading empty is the signal."""
        for rank in self._ranks:
            rank.sock.close()
        for rank in self._ranks:
            try:
                rank.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                rank.process.kill()
        self._folder.cleanup()
