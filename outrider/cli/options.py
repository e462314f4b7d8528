"""The options of the server as one table, read from the fields of the configs.

The parser, the YAML reader, ``outrider check``, the schema and ``docs/flags.md`` all walk this table, so none
of them can disagree about a name, a type or a bound. Converts single values; knows no argparse. No torch.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from outrider.cli.ignored import IgnoredConfig
from outrider.config import EngineConfig, ServerConfig, field_fault, flag_name
from outrider.errors import ConfigError

CONFIGS = (EngineConfig, ServerConfig, IgnoredConfig)

_MULTIPLIERS: dict[str, int] = {
    **{letter: 1000**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}
_HUMAN_INT = re.compile(r"([+-]?\d+)(\.\d+)?([kmgtKMGT]?)")


@dataclass(frozen=True)
class Option:
    """One setting: ``name`` is the field, ``kind`` its type without None, ``config`` the owning class."""

    name: str
    kind: type
    optional: bool
    default: Any
    metadata: Mapping[str, Any]
    config: type

    @property
    def flag(self) -> str:
        """The long flag, such as ``--max-model-len``."""
        return flag_name(self.name)

    @property
    def key(self) -> str:
        """The YAML key, such as ``max-model-len``."""
        return self.flag[2:]

    @property
    def group(self) -> str:
        """Heading under which help and docs show the option."""
        return str(self.metadata.get("group", "Other"))

    @property
    def no_effect(self) -> str | None:
        """Why the option changes nothing here, or None when it does."""
        return self.metadata.get("no_effect")

    def fault(self, value: Any) -> str | None:
        """One sentence about what is wrong with a converted value, or None."""
        return field_fault(self.name, value, self.metadata)

    def from_text(self, text: str) -> Any:
        """The value that ``text`` after the flag means (for lists: one element unless ``json``)."""
        if self.optional and text in ("", "None"):
            return None
        if self.metadata.get("auto") and text in ("auto", "-1"):
            return None
        if self.kind is int:
            return human_int(text, self.flag)
        if self.kind is float:
            return _finite_float(text, self.flag)
        if self.kind is dict and text in ("", "None"):
            return {}
        if self.kind is dict or self.metadata.get("json"):
            return self._from_json(text)
        return text

    def from_yaml(self, value: Any) -> Any:
        """The value that a YAML scalar, list or map means under this key."""
        if value is None or (isinstance(value, str) and self.kind is not list):
            return self._from_yaml_text("None" if value is None else value)
        if self.kind is list:
            return self._list_of(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if self.metadata.get("auto") and value == -1:
            return None
        if self.kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if type(value) is not self.kind:
            raise ConfigError(f"{self.key}: {value!r} is not {_A_KIND[self.kind]}.")
        return value

    def _from_yaml_text(self, text: str) -> Any:
        if self.kind is bool:
            raise ConfigError(f"{self.key}: {text!r} is not true or false; write it without quotes.")
        if text == "None" and not self.optional:
            raise ConfigError(f"{self.key} needs a value; remove the line to use the default.")
        return self.from_text(text)

    def _list_of(self, value: Any) -> list[str]:
        if isinstance(value, str) and self.metadata.get("json"):
            value = self._from_json(value)
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (bool, dict, list)) or item is None for item in items):
            raise ConfigError(f"{self.key}: {value!r} is not a list of texts.")
        return [str(item) for item in items]

    def _from_json(self, text: str) -> Any:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.flag}: {text!r} is not JSON ({error}).") from None
        if not isinstance(value, self.kind):
            raise ConfigError(f"{self.flag}: {text!r} is not {_A_KIND[self.kind]} in JSON.")
        return value


_A_KIND = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a map",
}


@functools.cache
def all_options() -> Mapping[str, Option]:
    """Every option by its field name, in the order of the dataclasses."""
    table: dict[str, Option] = {}
    for config in CONFIGS:
        hints = get_type_hints(config)
        for item in fields(config):  # type: ignore[arg-type]
            kind, optional = _kind(hints[item.name])
            default = item.default if item.default_factory is MISSING else item.default_factory()
            table[item.name] = Option(item.name, kind, optional, default, item.metadata, config)
    return MappingProxyType(table)


def _kind(hint: Any) -> tuple[type, bool]:
    """``int | None`` -> ``(int, True)``; ``list[str]`` -> ``(list, False)``."""
    arguments = [a for a in get_args(hint) if a is not type(None)]
    optional = type(None) in get_args(hint)
    inner = arguments[0] if optional else hint
    return get_origin(inner) or inner, optional


def human_int(text: str, flag: str) -> int:
    """``8192``, ``8k`` (8000), ``25.6k`` (25600) or ``8K`` (8192) as an integer."""
    match = _HUMAN_INT.fullmatch(text)
    if match:
        whole, decimals, unit = match.groups()
        if not decimals:
            return int(whole) * _MULTIPLIERS.get(unit, 1)
        if unit.islower():
            return round(float(whole + decimals) * _MULTIPLIERS[unit])
    raise ConfigError(f"{flag}: {text!r} is not an integer; write it as 8192, 8k or 8K.")


def _finite_float(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{flag}: {text!r} is not a number.")
    return value


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the closest of ``names``, else a full stop."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."
