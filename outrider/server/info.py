"""The small endpoints: models, probes, version, load, tokenisation, server facts. One function per route."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import msgspec
from starlette.responses import Response

from outrider import __version__
from outrider.errors import RequestError
from outrider.server.context import THREAD_THRESHOLD_CHARS, ServerContext
from outrider.server.errors import JSONResponse
from outrider.server.messages import render_chat
from outrider.server.protocol import DetokenizeBody, TokenizeBody

_PERMISSION = {
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


def models(context: ServerContext) -> Response:
    """GET /v1/models: one card per served name."""
    cards = [
        {
            "id": name,
            "object": "model",
            "created": context.started_s,
            "owned_by": "outrider",
            "root": context.engine.info.model,
            "parent": None,
            "max_model_len": context.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{uuid.uuid4().hex}",
                    "object": "model_permission",
                    "created": context.started_s,
                    **_PERMISSION,
                }
            ],
        }
        for name in context.model_names
    ]
    return JSONResponse({"object": "list", "data": cards})


def alive(context: ServerContext) -> Response:
    """GET /livez: whether the front end answers and its engine is there or can be started again."""
    health = context.engine.health()
    return _probe(health.alive, health.reason, health.last_step_age_s)


def ready(context: ServerContext) -> Response:
    """GET /readyz, /health, /ping: whether requests would be served now."""
    health = context.engine.health()
    return _probe(health.ready and health.alive, health.reason, health.last_step_age_s)


def _probe(good: bool, reason: str, last_step_age_s: float) -> Response:
    status = "ok" if good else "unavailable"
    body = {"status": status, "reason": reason, "last_step_age_s": round(last_step_age_s, 3)}
    return JSONResponse(body, status_code=200 if good else 503)


def version() -> Response:
    """GET /version."""
    return JSONResponse({"version": __version__})


def load(context: ServerContext) -> Response:
    """GET /load: requests being worked on, 0 unless load tracking is on."""
    tracked = context.server_config.enable_server_load_tracking
    return JSONResponse({"server_load": context.metrics.in_flight if tracked else 0})


def metrics(context: ServerContext) -> Response:
    """GET /metrics in Prometheus text format."""
    return Response(context.metrics.render(), media_type="text/plain; version=0.0.4")


async def tokenize(context: ServerContext, body: TokenizeBody) -> Response:
    """POST /tokenize: ids of a text, or of messages in the chat template."""
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Send either prompt or messages.", param="prompt")
    if body.prompt is not None:
        ids = await context.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        ids = (await render_chat(context, body)).ids
    names = [context.tokenizer.token_name(i) for i in ids] if body.return_token_strs else None
    return JSONResponse(
        {"count": len(ids), "max_model_len": context.max_model_len, "tokens": ids, "token_strs": names}
    )


async def detokenize(context: ServerContext, body: DetokenizeBody) -> Response:
    """POST /detokenize: the text of ids, special tokens kept."""
    context.check_model(body.model)
    if body.tokens and max(body.tokens) >= context.vocab_size:
        raise RequestError(
            f"tokens holds {max(body.tokens)}, but ids must be below {context.vocab_size}.", param="tokens"
        )
    if len(body.tokens) < THREAD_THRESHOLD_CHARS:
        return JSONResponse({"prompt": context.tokenizer.decode(body.tokens)})
    return JSONResponse({"prompt": await asyncio.to_thread(context.tokenizer.decode, body.tokens)})


def tokenizer_info(context: ServerContext) -> Response:
    """GET /tokenizer_info: the settings of tokenizer_config.json that clients read."""
    tokenizer = context.tokenizer
    info: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.config}
    info |= tokenizer.named_tokens
    info["chat_template"] = context.template.source if context.template else None
    return JSONResponse(info)


def server_info(context: ServerContext) -> Response:
    """GET /server_info: what the engine found and chose, and where it stands."""
    body = {
        "version": __version__,
        "model_names": context.model_names,
        "engine": msgspec.to_builtins(context.engine.info),
        "stats": msgspec.structs.asdict(context.engine.stats),
    }
    return JSONResponse(body)
