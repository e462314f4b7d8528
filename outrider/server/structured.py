"""The structured-output fields of a request to a ``GrammarSpec``: one notation behind four spellings.

Accepts ``response_format``, ``structured_outputs`` and the older ``guided_*`` fields. Called by ``sampling.py``;
only translates, the grammar itself is compiled elsewhere.
"""

from __future__ import annotations

from typing import Any

import msgspec

from outrider.errors import RequestError
from outrider.server.protocol import SamplingBody
from outrider.types import GrammarSpec

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def grammar_spec(body: SamplingBody) -> GrammarSpec | None:
    """The constraint that the request asks for, None for free text; ``RequestError`` when it is ambiguous."""
    options: dict[str, Any] = dict(body.structured_outputs or {})
    guided = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    options |= {kind: value for kind, value in guided.items() if value is not None}
    chosen = {kind: options[kind] for kind in _KINDS if options.get(kind) not in (None, False)}
    if body.structured_outputs is not None and not chosen:
        raise RequestError(
            f"structured_outputs needs one of {', '.join(_KINDS)}.", param="structured_outputs"
        )
    specs = [_spec(kind, value, options) for kind, value in chosen.items()]
    specs += _response_format(body.response_format)
    if len(specs) > 1:
        raise RequestError(
            "Only one structured-output constraint is possible; remove the others.",
            param="structured_outputs",
        )
    if specs and body.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids cannot be combined with structured output; remove one.",
            param="allowed_token_ids",
        )
    return specs[0] if specs else None


def _response_format(value: dict[str, Any] | None) -> list[GrammarSpec]:
    kind = None if value is None else value.get("type")
    if value is None or kind == "text":
        return []
    if kind == "json_object":
        return [GrammarSpec("json_object", "")]
    if kind == "json_schema":
        schema = value.get("json_schema")
        inner = schema.get("schema") if isinstance(schema, dict) else None
        if inner is None:
            raise RequestError(
                "response_format json_schema needs json_schema.schema.", param="response_format"
            )
        return [_spec("json", inner, {})]
    raise RequestError(
        "response_format.type must be 'text', 'json_object' or 'json_schema'.", param="response_format"
    )


def _spec(kind: str, value: Any, options: dict[str, Any]) -> GrammarSpec:
    if kind == "json_object":
        tuning = _tuning(options)
        return (
            GrammarSpec("json_schema", _json({"type": "object", **tuning}))
            if tuning
            else GrammarSpec(kind, "")
        )
    if kind == "json" and isinstance(value, (dict, str, bool)):
        return GrammarSpec("json_schema", _schema(value, options))
    if kind == "choice" and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return GrammarSpec("choice", _json(value))
    if kind in ("regex", "grammar") and isinstance(value, str) and value:
        return GrammarSpec(kind, value)
    raise RequestError(f"The '{kind}' constraint has the wrong type.", param="structured_outputs")


def _schema(value: dict[str, Any] | str | bool, options: dict[str, Any]) -> str:
    tuning = _tuning(options)
    if tuning or options.get("disable_additional_properties"):
        schema = _decoded(value) if isinstance(value, str) else value
        if isinstance(schema, dict):
            closed = {"additionalProperties": False} if options.get("disable_additional_properties") else {}
            return _json({**schema, **closed, **tuning})
    return value if isinstance(value, str) else _json(value)


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError("The JSON schema is not valid JSON.", param="structured_outputs") from error


def _tuning(options: dict[str, Any]) -> dict[str, Any]:
    """The white space options of ``structured_outputs`` in the notation of the grammar's builder."""
    if options.get("disable_any_whitespace"):
        return {"x-guidance": {"whitespace_flexible": False}}
    pattern = options.get("whitespace_pattern")
    return {"x-guidance": {"whitespace_pattern": pattern}} if isinstance(pattern, str) else {}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
