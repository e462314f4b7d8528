"""uvicorn with the shutdown that a serving process owes its clients.

Called by ``cli/serve.py``. SIGTERM or SIGINT: accept nothing more, let running requests finish; at the
deadline (``--shutdown-timeout``) or at a second signal, end them with a final error event. Knows no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import uvicorn

from outrider.cli.http_protocol import BoundedProtocol
from outrider.config import ServerConfig

# After the deadline: time for the final events to reach clients before their connections are cut.
LAST_WORDS_S = 5.0
# Longer than clients keep idle connections (5 to 60 s): who closes first must not be closed upon while it sends.
KEEP_ALIVE_S = 65

# What the kernel may hold of an answer that nobody reads; inherited by every connection.
SEND_BUFFER_BYTES = 256 << 10

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """A uvicorn server that drains; ``end_requests`` is awaited once when waiting is over."""

    def __init__(
        self, config: uvicorn.Config, drain_s: float, end_requests: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._end_requests = end_requests
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end the running requests at once."""
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, wait for running requests, end the rest at the deadline."""
        logger.info("Draining: running requests have %.0f s to finish.", self._drain_s)
        ender = asyncio.create_task(self._end_late_requests())
        await super().shutdown(sockets)
        ender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ender

    async def _end_late_requests(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._drain_s)
        logger.warning("Ending the requests that still run.")
        await self._end_requests()


def uvicorn_config(app: Any, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's settings for our flags; logging is left to ``outrider/logs.py``."""
    logging.getLogger("uvicorn").setLevel(_level(config.uvicorn_log_level))
    silent = {path.strip() for path in config.disable_access_log_for_endpoints.split(",") if path.strip()}
    if silent:
        logging.getLogger("uvicorn.access").addFilter(_AccessFilter(silent))
    return uvicorn.Config(
        app,
        loop="none",
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=not config.disable_uvicorn_access_log,
        root_path=config.root_path,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=ssl.VerifyMode(config.ssl_cert_reqs),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.shutdown_timeout + LAST_WORDS_S) + 1,
        server_header=False,
    )


async def run_http(
    app: Any, config: ServerConfig, sock: socket.socket, end_requests: Callable[[], Awaitable[None]]
) -> None:
    """Serve ``app`` on the bound socket until a signal; returns after the drain."""
    server = HttpServer(uvicorn_config(app, config), config.shutdown_timeout, end_requests)
    # uvicorn raises the signal again when it is done; by then there is nothing left to stop.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    sock.listen(server.config.backlog)
    await server.serve(sockets=[sock])


def _level(name: str) -> int:
    return 5 if name == "trace" else int(getattr(logging, name.upper()))


class _AccessFilter(logging.Filter):
    """Drops access records of some paths; their args are (client, method, path, version, status)."""

    def __init__(self, paths: set[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args
        path = str(args[2]).split("?")[0] if isinstance(args, tuple) and len(args) > 2 else ""
        return path not in self._paths
