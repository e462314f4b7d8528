"""The engine's process: ``python -m outrider.engine.process FD``, started by ``engine.client``.

Reads requests from the inherited Unix socket, steps the engine while there is work, writes events back. It ends
with its parent, whatever killed that: the kernel signals it, and the socket reads empty.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from typing import NoReturn

import msgspec

from outrider.config import EngineConfig
from outrider.engine.engine import Engine
from outrider.engine.messages import (
    Abort,
    Add,
    Events,
    FrameReader,
    Progress,
    Ready,
    Refused,
    ResetPrefixCache,
    Stop,
    ToEngine,
    encode_frame,
    send_frame,
)
from outrider.engine.scheduler import FAILED
from outrider.errors import ConfigError
from outrider.logs import setup_logging
from outrider.startup import process_age_s, settle_heap
from outrider.types import FINISH_ERROR, Request, TokenEvent

HEARTBEAT_S = 1.0
NEWS_S = 0.1
"""Steps without events (chunks of a long prompt) are reported this often."""
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger("outrider.engine")


class Outbox:
    """Writes frames in order: at once what the socket takes at once, the rest from a thread of its own.

    So news leave before the next step is prepared, and a slow front end never holds up a step.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Its first is being written: the thread has the socket till then.
        self._waiting: deque[memoryview] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: object) -> None:
        """Write a message or queue it, never waiting for the reader."""
        frame = memoryview(encode_frame(message))
        with self._changed:
            rest = frame if self._waiting else frame[self._try_send(frame) :]
            if rest:
                self._waiting.append(rest)
                self._changed.notify()

    def close(self) -> None:
        """Write what is queued and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _try_send(self, frame: memoryview) -> int:
        """How many bytes of ``frame`` the socket took without waiting."""
        try:
            return self._sock.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            _end_without_front_end()

    def _run(self) -> None:
        while (frame := self._first()) is not None:
            try:
                self._sock.sendall(frame)
            except OSError:
                _end_without_front_end()
            with self._changed:
                self._waiting.popleft()

    def _first(self) -> memoryview | None:
        """Wait for something to write; None when all is written and no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting[0] if self._waiting else None


def _end_without_front_end() -> NoReturn:
    """The front end is gone, and with it every client."""
    os._exit(1)


class EngineLoop:
    """Moves messages between the socket and the engine."""

    def __init__(self, engine: Engine, sock: socket.socket, outbox: Outbox) -> None:
        self._engine = engine
        self._sock = sock
        self._outbox = outbox
        self._reader = FrameReader(ToEngine)
        self._stopping = False
        self._was_busy = True
        self._published_s = 0.0

    def run(self) -> None:
        """Serve until the front end says stop or goes away."""
        while not self._stopping:
            timeout = 0.0 if self._engine.has_work else HEARTBEAT_S
            events = self._receive(timeout)
            if self._engine.has_work:
                self._was_busy = True
                events += self._engine.step()
                if not events and not self._engine.is_launching:
                    self._receive(0.001)  # only grammars are being built: do not spin
            elif not events and self._was_busy:
                self._check_ledger()
            self._publish(events)

    def _check_ledger(self) -> None:
        """Once after every busy time; books that do not add up end the process, and a new one starts clean."""
        self._engine.scheduler.check_integrity()
        self._engine.scheduler.stats.ledger_checks += 1
        self._was_busy = False

    def _publish(self, events: list[TokenEvent]) -> None:
        now = time.monotonic()
        if not events and now - self._published_s < NEWS_S:
            return
        self._published_s = now
        stats = self._engine.stats()
        stats = msgspec.structs.replace(stats, step_token_counts=list(stats.step_token_counts))
        owes_steps = self._engine.scheduler.has_work or self._engine.is_launching
        self._outbox.send(Events(events, stats, owes_steps))

    def _receive(self, timeout: float) -> list[TokenEvent]:
        """Take in what has arrived, waiting up to ``timeout`` seconds for the first of it."""
        events: list[TokenEvent] = []
        while select.select([self._sock], [], [], timeout)[0]:
            data = self._sock.recv(1 << 20)
            if not data:
                self._stopping = True
                break
            for message in self._reader.feed(data):
                events += self._handle(message)
            timeout = 0.0
        return events

    def _handle(self, message: object) -> list[TokenEvent]:
        match message:
            case Add(request):
                return self._add(request)
            case Abort(request_ids):
                return [event for rid in request_ids for event in self._engine.abort(rid)]
            case ResetPrefixCache():
                self._engine.scheduler.kv.pool.reset_cache()
            case Stop():
                self._stopping = True
        return []

    def _add(self, request: Request) -> list[TokenEvent]:
        """Whatever a request makes go wrong on its way in is its own failure, not the engine's."""
        try:
            return self._engine.add(request)
        except Exception:
            logger.exception("Request %s could not be added.", request.request_id)
            self._engine.abort(request.request_id)
            return [TokenEvent(request.request_id, [], FINISH_ERROR, error=FAILED)]


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def main(fd: int, parent_pid: int) -> int:
    """Build the engine from the config on the socket, then serve it."""
    die_with_parent(parent_pid)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the front end's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    setup_logging("EngineCore")

    from outrider.runner.setup import build_engine  # torch: seconds, so before the config is waited for

    config = _read_config(sock)
    imports_s = process_age_s()
    try:
        engine, info = build_engine(config, lambda *p: send_frame(sock, Progress(*p)))
    except Exception as error:
        is_config = isinstance(error, ConfigError)
        if not is_config:
            logger.exception("The engine could not start")
        send_frame(sock, Refused(str(error) if is_config else _root_cause(error), is_config))
        return 2 if is_config else 1
    settle_heap()
    outbox = Outbox(sock)
    stages = {"imports": round(imports_s, 3), **info.startup_s}
    outbox.send(Ready(msgspec.structs.replace(info, startup_s=stages)))
    EngineLoop(engine, sock, outbox).run()
    outbox.close()
    engine.shutdown()
    return 0


def _root_cause(error: BaseException) -> str:
    return f"The engine could not start ({type(error).__name__}: {error}); the log above has the details."


def _read_config(sock: socket.socket) -> EngineConfig:
    header = _read_exactly(sock, 4)
    body = _read_exactly(sock, int.from_bytes(header, "little"))
    return msgspec.msgpack.decode(body, type=EngineConfig)


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            sys.exit(1)
        data += piece
    return data


if __name__ == "__main__":
    status = main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is shut down; what libraries print while the interpreter unwinds helps nobody
