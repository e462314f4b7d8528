"""A real uvicorn over the fake engine, once per module, and clients for it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI

from outrider.config import EngineConfig, ServerConfig
from outrider.models.config import ModelConfig
from outrider.server.app import create_app
from outrider.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[3] / "shared"))
MODEL_PATH = ""
TINY = SHARED / "fixtures" / "llama4-tiny-a" / "bf16"


def tiny_model_config(**changes: Any) -> ModelConfig:
    """Facts of the tiny Llama 4 that the server reads; the other fields only fill the struct."""
    facts: dict[str, Any] = dict(
        architecture="Llama4ForConditionalGeneration",
        vocab_size=1024,
        hidden_size=128,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        intermediate_size=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=4096,
        dtype="float32",
        rope_layers=(True,),
        moe_layers=(False,),
        interleaved_rope=True,
        bos_token_id=992,
        eos_token_ids=(993, 999, 1000),
        image_token_id=1010,
        boi_token_id=1005,
        eoi_token_id=1006,
    )
    return ModelConfig(**(facts | changes))


class Server:
    """One running server: its URL and the engine behind it."""

    def __init__(self, app: FastAPI, engine: FakeEngine) -> None:
        self.app = app
        self.engine = engine
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_keep_alive=60)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=30)
        for _ in range(100):
            if self._uvicorn.started:
                break
            threading.Event().wait(0.02)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._uvicorn.serve(sockets=[self._socket]))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def close(self) -> None:
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    if not TINY.is_dir():
        pytest.skip("the shared fixtures are not here")
    return Tokenizer.load(TINY)


@pytest.fixture
def make_server(tokenizer: Tokenizer) -> Iterator[Callable[..., Server]]:
    """``make_server(reply, server={...}, model={...})`` -> a running ``Server``; ended after the test."""
    servers: list[Server] = []

    def make(
        reply: Any = "Hello world, this is a reply.",
        *,
        server: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        max_model_len: int = 512,
    ) -> Server:
        ids = tokenizer.encode(reply, add_special_tokens=False) if isinstance(reply, str) else reply
        engine = FakeEngine(
            ids if callable(ids) else lambda request: ids, vocab_size=1024, max_model_len=max_model_len
        )
        config = ServerConfig(**({"served_model_name": ["tiny"]} | (server or {})))
        app = create_app(
            engine, tokenizer, tiny_model_config(**(model or {})), config, EngineConfig(model=MODEL_PATH)
        )
        servers.append(Server(app, engine))
        return servers[-1]

    yield make
    for made in servers:
        made.close()


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()
