"""The listening socket and the limit on open files, taken before the model loads.

Called by ``cli/serve.py``. A port that is in use fails in milliseconds instead of after the weights; the
socket is bound but does not listen yet, so clients are refused until the server is ready.
"""

from __future__ import annotations

import os
import resource
import socket
import stat

from outrider.config import ServerConfig
from outrider.errors import ConfigError

# One stream is one descriptor; 65,535 is the usual hard limit of containers.
OPEN_FILES = 65_535


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket for ``--uds`` or ``--host``/``--port``; ConfigError when the address cannot be had."""
    if config.uds:
        return _bind_unix(config.uds)
    host = config.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, config.port))
    except OSError as error:
        sock.close()
        where = f"{config.host or '0.0.0.0'}:{config.port}"
        raise ConfigError(
            f"{where} cannot be bound ({error.strerror or error}); use another --port."
        ) from None
    sock.set_inheritable(False)
    return sock


def url_of(sock: socket.socket, config: ServerConfig) -> str:
    """The address to show: ``http://0.0.0.0:8000`` or ``unix:/path``."""
    if config.uds:
        return f"unix:{config.uds}"
    scheme = "https" if config.ssl_certfile else "http"
    host = config.host or "0.0.0.0"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def raise_open_file_limit() -> None:
    """Lift the soft limit on descriptors as far as the hard one allows, up to ``OPEN_FILES``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind_unix(path: str) -> socket.socket:
    """Bind ``path``, replacing the socket of a server that is gone but nothing else."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--uds {path} cannot be bound ({error.strerror or error}).") from None
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
