"""The JSON schema of a ``--config`` file, generated from ``cli/options.py``.

Used by ``outrider check``, which prints it for editors with ``--schema``. Builds plain dicts; validates none.
"""

from __future__ import annotations

from typing import Any

from outrider.cli.options import Option, all_options

_HUMAN_INT = {"type": "string", "pattern": r"^[+-]?(\d+[kmgtKMGT]?|\d+\.\d+[kmgt])$"}


def config_schema() -> dict[str, Any]:
    """A draft 2020-12 schema whose properties are the YAML keys, both with ``-`` and with ``_``."""
    properties: dict[str, Any] = {}
    for option in all_options().values():
        for key in {option.key, option.name}:
            properties[key] = option_schema(option)
            if option.kind is bool:
                separator = "-" if "-" in key or key == option.key else "_"
                properties[f"no{separator}{key}"] = {"type": "boolean"}
    properties["disable-log-requests"] = properties["disable_log_requests"] = {"type": "boolean"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of outrider serve",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def option_schema(option: Option) -> dict[str, Any]:
    """The schema of one setting's value."""
    forms = _forms(option)
    if option.optional:
        forms.append({"enum": [None, "None", ""]})
    if option.metadata.get("auto"):
        forms.append({"enum": ["auto", -1]})
    schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {**schema, "description": option.metadata["help"]}


def _forms(option: Option) -> list[dict[str, Any]]:
    choices = option.metadata.get("choices")
    if choices:
        return [{"enum": list(choices)}]
    if option.kind is bool:
        return [{"type": "boolean"}]
    if option.kind is int:
        return [{"type": "integer", **_bounds(option)}, _HUMAN_INT]
    if option.kind is float:
        return [
            {"type": "number", **_bounds(option)},
            {"type": "string", "pattern": r"^[+-]?[0-9.]+(e[+-]?\d+)?$"},
        ]
    if option.kind is list:
        item = {"type": ["string", "number"]}
        return [{"type": "array", "items": item}, item]
    if option.kind is dict:
        return [{"type": "object"}, {"type": "string"}]
    return [{"type": ["string", "number"]}]


def _bounds(option: Option) -> dict[str, Any]:
    names = {"min": "minimum", "max": "maximum", "above": "exclusiveMinimum"}
    return {names[key]: option.metadata[key] for key in names if key in option.metadata}
