"""The front end's handle on the engine process: starts it, talks to it, notices its death, starts it again.

Implements ``engine.protocol.EngineClient`` on one asyncio loop. Called by the server. Never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outrider.config import EngineConfig
from outrider.engine.backlog import Backlog
from outrider.engine.liveness import RESTART_S, TICK_S, Liveness
from outrider.engine.messages import (
    Abort,
    Add,
    Events,
    FrameReader,
    FromEngine,
    Progress,
    Ready,
    Refused,
    ResetPrefixCache,
    Stop,
    encode_frame,
)
from outrider.engine.protocol import Health
from outrider.engine.streams import EventStream
from outrider.errors import ConfigError, EngineDeadError, EngineError
from outrider.types import FINISH_ERROR, EngineInfo, EngineStats, Request, TokenEvent

ProgressCallback = Callable[[str, int, int], None]

ENGINE_GONE = "The engine stopped while it worked on this request; send it again."
ENGINE_STARTING = "The engine is starting; try again in a few seconds."
SHUTTING_DOWN = "The server is shutting down; send the request to another one."
TOO_SLOW = "The client reads its answer too slowly; the server ended the request."
EXPIRED = "The request took longer than the {:.0f} s that --request-timeout allows."

ENGINE_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""Unless the user says otherwise: threads that spin while they wait starve each other on shared cores, and a GPU's
free memory is not cut into pieces that fit no prompt (docs/log.md)."""

_END_GRACE_S = 3.0
_MAX_FAILED_STARTS = 5
"""So many failed attempts to start the engine again, and the liveness probe gives up too."""

logger = logging.getLogger("outrider.engine")


@dataclass(frozen=True)
class Bounds:
    """What one client may ask of the engine; see the flags of the same names. None: from the measured rate."""

    max_num_queued_tokens: int | None = None
    request_timeout: float = 3600.0


class ProcessEngineClient:
    """One engine process and the requests it works on."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: ProgressCallback | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._bounds = bounds or Bounds()
        self._streams: dict[str, EventStream] = {}
        self._backlog = Backlog(self._bounds.max_num_queued_tokens)
        self._liveness = Liveness()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = False
        self._closing = False
        self._in_stall = False
        self._failed_starts = 0
        self.num_restarts = 0
        self.num_stalls = 0
        self.stats = EngineStats()
        self.info: EngineInfo

    # -- life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and wait until it is ready; ``ConfigError`` or ``EngineError`` if it refuses."""
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the process; running requests get a final error event first. Idempotent."""
        self._closing = True
        self._ready = False
        self._fail_all(SHUTTING_DOWN)
        self._send(Stop())
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_process(_END_GRACE_S)

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "outrider.engine.process", str(theirs.fileno()), str(os.getpid())]
        environment = {**ENGINE_ENVIRONMENT, **os.environ}
        # A session of its own: the ranks that the engine starts are in it, so that all end together.
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        self._frames = FrameReader(FromEngine)
        self._writer.write(encode_frame(self._config))
        while not self._ready:
            for message in await self._read():
                self._handle(message)

    async def _read(self) -> list[object]:
        assert self._reader is not None
        try:
            data = await self._reader.read(1 << 20)
        except ConnectionError:  # it went away with something of ours unread
            data = b""
        if not data:
            raise EngineDeadError("The engine process ended; the log above says why.")
        return self._frames.feed(data)

    async def _supervise(self) -> None:
        """Read events for ever; when the process dies, tell its clients and start another."""
        watchdog = asyncio.create_task(self._watch())
        try:
            while True:
                try:
                    while True:
                        for message in await self._read():
                            self._handle(message)
                except (EngineError, OSError, ValueError) as error:
                    await self._recover(error)
        finally:
            watchdog.cancel()

    async def _recover(self, error: Exception) -> None:
        logger.error("The engine process ended (%s); starting it again.", error)
        self._ready = False
        self._fail_all(ENGINE_GONE)
        delay = 0.5
        while not self._closing:
            await self._end_process(grace_s=0.0)
            try:
                await self._launch()
                self.num_restarts += 1
                self._failed_starts = 0
                logger.info("The engine is ready again.")
                return
            except (EngineError, ConfigError, OSError, ValueError) as failure:
                self._failed_starts += 1
                logger.error("The engine could not be started again: %s", failure)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 30.0)

    async def _end_process(self, grace_s: float) -> None:
        """Wait for the process up to ``grace_s``, then kill what is left of its session."""
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + grace_s
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        _signal_session(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        self._process = None
        if self._writer is not None:
            self._writer.close()

    async def _watch(self) -> None:
        """Once a second: notice a stall, and end requests that are over their time."""
        while True:
            await asyncio.sleep(TICK_S)
            self._liveness.tick()
            self._note_stall(self._liveness.stalled_s if self._ready else 0.0)
            now = time.monotonic()
            for request_id in [rid for rid, stream in self._streams.items() if now > stream.expires_s]:
                self._end_stream(request_id, EXPIRED.format(self._bounds.request_timeout), status=504)

    def _note_stall(self, stalled_s: float) -> None:
        """Log every thread's stack once per stall, and count it; a stall that does not end is killed."""
        process = self._process
        if stalled_s and not self._in_stall and process is not None:
            self.num_stalls += 1
            logger.error(
                "The engine has not moved for %.0f s (process %d is %s); the stacks of its threads follow.",
                stalled_s,
                process.pid,
                _process_state(process.pid),
            )
            _ask_for_stacks(process.pid)
        if stalled_s > RESTART_S and process is not None:
            logger.error("The engine has not moved for %.0f s; killing it.", stalled_s)
            _signal_session(process.pid, signal.SIGKILL)
        if self._in_stall and not stalled_s:
            logger.info("The engine moves again.")
        self._in_stall = stalled_s > 0

    # -- messages ------------------------------------------------------------------------------------

    def _handle(self, message: object) -> None:
        match message:
            case Events(events, stats, has_work):
                self._liveness.message(stats.steps, has_work)
                self._backlog.observe(stats.prompt_tokens)
                self.stats = stats
                for event in events:
                    self._deliver(event)
            case Progress(stage, done, total):
                if self._on_progress is not None:
                    self._on_progress(stage, done, total)
            case Ready(info):
                self.info = info
                self._liveness.restart()
                self._ready = True
            case Refused(text, is_config):
                raise ConfigError(text) if is_config else EngineError(text)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return  # aborted by its client
        self._backlog.remove(event.request_id)
        if event.finish_reason is not None:
            del self._streams[event.request_id]
        if not stream.put(event) and event.finish_reason is None:
            self._end_stream(event.request_id, TOO_SLOW)

    def _end_stream(self, request_id: str, error: str, status: int = 500) -> None:
        """Stop a request from this side: its reader gets the error, the engine an abort."""
        stream = self._streams[request_id]
        self.abort(request_id)
        stream.replace(TokenEvent(request_id, [], FINISH_ERROR, error=error, error_status=status))

    def _fail_all(self, error: str) -> None:
        for request_id in list(self._streams):
            self._deliver(TokenEvent(request_id, [], FINISH_ERROR, error=error, error_status=503))

    def _send(self, message: object) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    # -- EngineClient --------------------------------------------------------------------------------

    def submit(self, request: Request) -> EventStream:
        """Hand over a request; see ``EngineClient.submit``."""
        if not self._ready:
            raise EngineDeadError(SHUTTING_DOWN if self._closing else ENGINE_STARTING)
        request_id, num_tokens = request.request_id, len(request.prompt_token_ids)
        self._backlog.check(num_tokens, len(self._streams), self.info.max_num_seqs)
        stream = EventStream(lambda: self.abort(request_id), time.monotonic() + self._bounds.request_timeout)
        self._streams[request_id] = stream
        self._backlog.add(request_id, num_tokens)
        self._send(Add(request))
        return stream

    def abort(self, request_id: str) -> None:
        """Stop working on a request; see ``EngineClient.abort``."""
        self._backlog.remove(request_id)
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort([request_id]))

    def health(self) -> Health:
        """Whether the process lives, and whether its steps move while there is work."""
        age = self._liveness.step_age_s
        if self._process is None or self._process.poll() is not None or not self._ready:
            reason = SHUTTING_DOWN if self._closing else "The engine is not running; it is being started."
            return Health(False, self._failed_starts < _MAX_FAILED_STARTS, reason, age)
        stalled_s = self._liveness.stalled_s
        if stalled_s:
            return Health(False, True, f"The engine has not moved for {stalled_s:.0f} s.", age)
        return Health(True, True, "", age)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prompt beginnings; blocks in use are kept by their requests."""
        self._send(ResetPrefixCache())
        return True


def _signal_session(pid: int, number: signal.Signals) -> None:
    """Signal the engine and everything it started; nothing happens when all of it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _ask_for_stacks(session: int) -> None:
    """SIGUSR1 to the engine and its ranks; not to what else they started, which it would kill (a compiler)."""
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if (
                os.getsid(pid) == session
                and int(_proc_status(pid, "SigCgt", "0"), 16) >> (signal.SIGUSR1 - 1) & 1
            ):
                os.kill(pid, signal.SIGUSR1)


def _process_state(pid: int) -> str:
    """The kernel's word for what the process does, such as ``S (sleeping)`` or ``T (stopped)``."""
    return _proc_status(pid, "State", "unknown")


def _proc_status(pid: int, field: str, default: str) -> str:
    """A field of ``/proc/PID/status``."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return default
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:")), default)
