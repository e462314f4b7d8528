"""``outrider serve``: flags in, a server that answers out. The one place where all rooms are put together.

Called by ``cli/commands.py``. Order matters: settings, port, files, engine, HTTP; the line
``Application startup complete.`` comes only when the engine is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider import __version__
from outrider.cli.help import serve_help
from outrider.cli.parser import parse_serve
from outrider.config import EngineConfig, ServerConfig
from outrider.errors import ConfigError
from outrider.startup import breakdown, process_age_s, settle_heap

if TYPE_CHECKING:
    import socket

    from outrider.engine.client import ProcessEngineClient
    from outrider.text.tokenizer import Tokenizer
    from outrider.types import EngineInfo

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """The command: parse, or print help; then serve until a signal."""
    for token in argv:
        match = re.fullmatch(r"(?:-h|--help)(?:=(.*))?", token)
        if match:
            print(serve_help(match[1]), end="")
            return 0
    settings = parse_serve(argv)
    from outrider.logs import setup_logging

    setup_logging("APIServer")
    logger.info("outrider %s, model %s", __version__, settings.engine.model or "(embedded)")
    logger.info("non-default args: %s", settings.given)
    for note in settings.notes:
        logger.warning(note)
    return serve(settings.engine, settings.server)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve with these configs until SIGTERM or SIGINT; returns the exit code."""
    import uvloop

    from outrider.cli.sockets import bind, raise_open_file_limit

    raise_open_file_limit()
    sock = bind(server_config)
    with contextlib.closing(sock):
        engine_config, server_config = resolve_files(engine_config, server_config, os.environ)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(engine_config, server_config, sock))
    return 0


def resolve_files(
    engine: EngineConfig, server: ServerConfig, environment: Mapping[str, str]
) -> tuple[EngineConfig, ServerConfig]:
    """The configs with paths instead of hub ids, the served name filled in, and keys from the environment."""
    from outrider.cli.model_files import EMBEDDED_NAME, resolve_model

    hub: dict[str, Any] = {
        "revision": engine.revision,
        "download_dir": engine.download_dir,
        "token": server.hf_token,
    }
    model = resolve_model(engine.model, weights=engine.load_format != "dummy", **hub)
    tokenizer = model
    if engine.tokenizer and engine.tokenizer != engine.model:
        tokenizer = resolve_model(engine.tokenizer, weights=False, **hub)
    return (
        replace(engine, model=str(model), tokenizer=str(tokenizer)),
        replace(
            server,
            served_model_name=server.served_model_name or [engine.model or EMBEDDED_NAME],
            api_key=api_keys(server, environment),
        ),
    )


def api_keys(server: ServerConfig, environment: Mapping[str, str]) -> list[str]:
    """The keys of ``--api-key`` and ``--api-key-file``, else the one in the environment."""
    keys = list(server.api_key)
    if server.api_key_file:
        try:
            text = Path(server.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"--api-key-file {server.api_key_file} cannot be read as text.") from None
        in_file = [line.strip() for line in text.splitlines() if line.strip()]
        if not in_file:
            raise ConfigError(f"--api-key-file {server.api_key_file} holds no key; write one a line.")
        keys += in_file
    if not keys:
        key = environment.get("OUTRIDER_API_KEY") or environment.get("VLLM_API_KEY")
        keys = [key] if key else []
    return keys


async def _serve(engine_config: EngineConfig, server_config: ServerConfig, sock: socket.socket) -> None:
    """Start the engine, then HTTP; returns when both have ended."""
    from outrider.models.config_hf import load_model_config

    model_config = load_model_config(engine_config.model)
    client, tokenizer = await _start_engine(engine_config, server_config)
    from outrider.cli.http_server import run_http
    from outrider.cli.sockets import url_of
    from outrider.cli.stats_line import log_stats
    from outrider.server.app import create_app

    tasks: list[asyncio.Task[None]] = []
    try:
        app = create_app(client, tokenizer, model_config, server_config, engine_config)
        settle_heap()
        logger.info(startup_line(client.info, process_age_s()))
        logger.info("Starting outrider server on %s", url_of(sock, server_config))
        if not server_config.disable_log_stats:
            tasks.append(asyncio.create_task(log_stats(lambda: client.stats)))
        await run_http(app, server_config, sock, client.close)
    finally:
        for task in tasks:
            task.cancel()
        await client.close()
        if server_config.uds:
            Path(server_config.uds).unlink(missing_ok=True)


async def _start_engine(
    engine_config: EngineConfig, server_config: ServerConfig
) -> tuple[ProcessEngineClient, Tokenizer]:
    """The engine, ready, and the tokenizer, read and checked meanwhile; what fails first ends the other."""
    from outrider.cli.progress import StartupProgress
    from outrider.engine.client import Bounds, ProcessEngineClient

    bounds = Bounds(server_config.max_num_queued_tokens, server_config.request_timeout)
    with StartupProgress() as progress:
        client = ProcessEngineClient(engine_config, progress, bounds)
        starting = asyncio.create_task(client.start())
        try:
            tokenizer = await asyncio.to_thread(_prepare_http, engine_config, server_config)
            await starting
        except BaseException:
            starting.cancel()
            await asyncio.wait([starting])
            await client.close()
            raise
    return client, tokenizer


def _prepare_http(engine_config: EngineConfig, server_config: ServerConfig) -> Tokenizer:
    """Import what HTTP needs, a second's work, and read the tokenizer; in a thread while the engine loads."""
    from outrider.cli import http_server  # noqa: F401
    from outrider.server.app import load_chat_template
    from outrider.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(str(engine_config.tokenizer))
    load_chat_template(tokenizer, server_config.chat_template)
    tokenizer.use_fastest_encoder()
    return tokenizer


def startup_line(info: EngineInfo, ready_s: float | None = None) -> str:
    """What the engine found and chose, in one line; ``ready_s`` is the time from the launch until now."""
    kernels = ", ".join(f"{op}: {name}" for op, name in info.kernels.items())
    return (
        f"{info.architecture} on {info.device}, {info.dtype}, quantization {info.quantization}, "
        f"KV cache {info.kv_cache_dtype}: {info.kv_capacity_tokens:,} tokens = "
        f"{info.max_concurrency:.1f} requests of {info.max_model_len:,}; "
        f"weights {info.weights_gb:.2f} GB; kernels: {kernels}; start-up: {breakdown(info.startup_s, ready_s)}"
    )
