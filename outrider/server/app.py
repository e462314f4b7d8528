"""The FastAPI application: which path calls which handler. No logic; each route is one line of another module."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from outrider import __version__
from outrider.config import EngineConfig, ServerConfig
from outrider.engine.protocol import EngineClient
from outrider.errors import EngineError, RequestError
from outrider.models.config import ModelConfig
from outrider.server import info
from outrider.server.call import read_body
from outrider.server.chat import create_chat_completion
from outrider.server.completions import create_completion
from outrider.server.context import ServerContext
from outrider.server.errors import JSONResponse, handle_disconnect, handle_error, handle_recursion
from outrider.server.media import MediaLoader
from outrider.server.metrics import Metrics
from outrider.server.middleware import Gate
from outrider.server.openapi import ERRORS, METRICS, add_schemas, body_docs
from outrider.server.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from outrider.server.responses import Responses
from outrider.server.responses_input import ResponsesBody
from outrider.text.chat_template import ChatTemplate
from outrider.text.images import ImageProcessor
from outrider.text.tokenizer import Tokenizer


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    server_config: ServerConfig,
    engine_config: EngineConfig,
) -> FastAPI:
    """The application over a started engine. ``ConfigError`` for a broken chat template."""
    names = server_config.served_model_name
    context = ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        template=load_chat_template(tokenizer, server_config.chat_template),
        model_config=model_config,
        engine_config=engine_config,
        server_config=server_config,
        metrics=Metrics(engine, engine_config, names[0] if names else engine.info.model),
        media=_media_loader(tokenizer, model_config, server_config, engine_config),
    )
    openapi_url = None if server_config.disable_fastapi_docs else "/openapi.json"
    app = FastAPI(
        title="outrider",
        version=__version__,
        redirect_slashes=False,
        openapi_url=openapi_url,
        responses=ERRORS,
    )
    add_schemas(app)
    app.state.context = context
    for error in (RequestError, EngineError, Exception):
        app.add_exception_handler(error, handle_error)
    app.add_exception_handler(RecursionError, handle_recursion)
    app.add_exception_handler(ClientDisconnect, handle_disconnect)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=server_config.allowed_origins,
        allow_credentials=server_config.allow_credentials,
        allow_methods=server_config.allowed_methods,
        allow_headers=server_config.allowed_headers,
    )
    app.add_middleware(
        Gate,
        metrics=context.metrics,
        api_keys=server_config.api_key,
        send_request_id=server_config.enable_request_id_headers,
    )
    _add_generation_routes(app, context)
    _add_info_routes(app, context)
    return app


def _media_loader(
    tokenizer: Tokenizer, model: ModelConfig, server: ServerConfig, engine: EngineConfig
) -> MediaLoader | None:
    if engine.language_model_only:
        return None
    processor = ImageProcessor.load(engine.model, model, tokenizer.special_tokens)
    return MediaLoader(processor, server) if processor else None


def load_chat_template(tokenizer: Tokenizer, override: str | None) -> ChatTemplate | None:
    """The checkpoint's template, or ``override``: a file's path or the template itself."""
    source = tokenizer.chat_template
    if override:
        is_file = "{" not in override and Path(override).is_file()
        source = Path(override).read_text(encoding="utf-8") if is_file else override
    return ChatTemplate(source, tokenizer.special_tokens, tokenizer.named_tokens) if source else None


def _add_generation_routes(app: FastAPI, context: ServerContext) -> None:
    @app.post("/v1/completions", openapi_extra=body_docs(CompletionBody))
    async def completions(http: Request) -> Response:
        return await create_completion(context, http, await read_body(http, CompletionBody))

    @app.post("/v1/chat/completions", openapi_extra=body_docs(ChatBody))
    async def chat_completions(http: Request) -> Response:
        return await create_chat_completion(context, http, await read_body(http, ChatBody))

    responses = Responses(context)

    @app.post("/v1/responses", openapi_extra=body_docs(ResponsesBody))
    async def create_response(http: Request) -> Response:
        return await responses.create(http, await read_body(http, ResponsesBody))

    @app.get("/v1/responses/{response_id}")
    async def get_response(http: Request, response_id: str) -> Response:
        return responses.get(http, response_id)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(http: Request, response_id: str) -> Response:
        return responses.delete(http, response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(http: Request, response_id: str) -> Response:
        return responses.cancel(http, response_id)

    @app.post("/tokenize", openapi_extra=body_docs(TokenizeBody))
    async def tokenize(http: Request) -> Response:
        return await info.tokenize(context, await read_body(http, TokenizeBody))

    @app.post("/detokenize", openapi_extra=body_docs(DetokenizeBody))
    async def detokenize(http: Request) -> Response:
        return await info.detokenize(context, await read_body(http, DetokenizeBody))

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        return JSONResponse({"success": await context.engine.reset_prefix_cache()})


def _add_info_routes(app: FastAPI, context: ServerContext) -> None:
    getters: dict[str, Callable[[ServerContext], Response]] = {
        "/v1/models": info.models,
        "/livez": info.alive,
        "/readyz": info.ready,
        "/health": info.ready,
        "/ping": info.ready,
        "/version": lambda _: info.version(),
        "/load": info.load,
        "/metrics": info.metrics,
        "/metrics/": info.metrics,
        "/tokenizer_info": info.tokenizer_info,
        "/server_info": info.server_info,
    }
    for path, getter in getters.items():
        page = METRICS if path == "/metrics" else {}
        app.add_api_route(
            path, _handler(getter, context), methods=["GET"], name=path.strip("/"), responses=page
        )
    app.add_api_route("/ping", _handler(info.ready, context), methods=["POST"], name="post ping")


def _handler(
    getter: Callable[[ServerContext], Response], context: ServerContext
) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def get() -> Response:
        return getter(context)

    return get
