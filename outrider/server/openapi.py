"""The OpenAPI page: bodies as the decoder reads them, errors as they are sent. Used by ``app.py`` only.

FastAPI writes the routes; the bodies are msgspec structs, whose schemas are added here under ``components``.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI

from outrider.server.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from outrider.server.responses_input import ResponsesBody

_BODIES: tuple[type[msgspec.Struct], ...] = (
    CompletionBody,
    ChatBody,
    ResponsesBody,
    TokenizeBody,
    DetokenizeBody,
)
_REF = "#/components/schemas/{name}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}
_STATUSES = {
    400: "The request cannot be served as it is.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, response or path.",
    413: "The body is too large.",
    422: "An image cannot be fetched or decoded.",
    500: "The server failed on this request.",
    503: "The server cannot take the request now; Retry-After says when to try again.",
    504: "The request took longer than the server allows.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {
            "application/json": {"schema": {} if status == 401 else {"$ref": _REF.format(name="Error")}}
        },
    }
    for status, text in _STATUSES.items()
}
"""What every route may answer."""

METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def body_docs(kind: type[Body]) -> dict[str, Any]:
    """A route's request body."""
    schema = {"$ref": _REF.format(name=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_schemas(app: FastAPI) -> None:
    """Put the schemas that the routes refer to into the page of ``app``."""
    _, components = msgspec.json.schema_components(_BODIES, ref_template=_REF)
    write = app.openapi

    def openapi() -> dict[str, Any]:
        page = write()
        page.setdefault("components", {}).setdefault("schemas", {}).update({**components, "Error": _ERROR})
        return page

    app.openapi = openapi  # type: ignore[method-assign]
