"""Rewrites a command line as people type it into one that argparse reads.

``_`` and ``-`` are the same in flag names, ``-O3`` is ``--optimization-level 3``, flags of older releases
get their present names, and dotted keys (``--compilation-config.level 3``) are collected into maps. Called
by ``cli/parser.py`` alone; looks at names only and leaves every other value as it was typed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from outrider.cli.options import Option, all_options, human_int, nearest
from outrider.errors import ConfigError

# Flags that releases of vLLM in use have dropped or renamed -> the flag that means the same today.
OLD_SPELLINGS = {"--disable-log-requests": "--no-enable-log-requests"}

_OPTIMIZATION = re.compile(r"-O=?(\d)")


def normalize(argv: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The rewritten arguments, and the maps built from dotted keys by field name."""
    plain: list[str] = []
    maps: dict[str, dict[str, Any]] = {}
    rest = iter(range(len(argv)))
    for i in rest:
        name, equals, value = argv[i].partition("=")
        if not _is_flag(name):
            plain.append(argv[i])
            continue
        root, dot, path = name.partition(".")
        option = _json_option(root) if dot else None
        if option is None:
            plain += _rename(argv[i], name.replace("_", "-"), equals + value)
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value, equals = argv[next(rest)], "="
        _store(maps.setdefault(option.name, {}), path, value if equals else "true")
    return plain, maps


def merge_maps(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over``; maps below are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_maps(below, value) if both else value  # type: ignore[arg-type]
    return merged


def with_dashes(token: str) -> str:
    """``--max_model_len=a_b`` -> ``--max-model-len=a_b``; values and short flags stay as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if _is_flag(name) else token


def _is_flag(token: str) -> bool:
    return bool(re.match(r"--?[A-Za-z]", token))


def _rename(token: str, name: str, tail: str) -> list[str]:
    level = _OPTIMIZATION.fullmatch(token)
    if level:
        return ["--optimization-level", level[1]]
    if token == "-O":
        return ["--optimization-level"]
    return [OLD_SPELLINGS.get(name, name) + tail]


def _json_option(root: str) -> Option | None:
    """The map option that a dotted flag begins with; None leaves the token to argparse."""
    root = root.replace("_", "-")
    maps = {option.flag: option for option in all_options().values() if option.kind is dict}
    shorts = {option.metadata["short"]: option for option in maps.values() if "short" in option.metadata}
    found = maps.get(root) or shorts.get(root)
    if found is None and root.startswith("--"):
        raise ConfigError(f"{root} takes no dotted keys{nearest(root, maps)}")
    return found


def _store(target: dict[str, Any], path: str, text: str) -> None:
    """Put the value at ``a.b.c``; a trailing ``+`` appends, splitting at commas."""
    append = path.endswith("+")
    *parents, last = path.rstrip("+").split(".")
    for key in parents:
        below = target.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{path!r} contradicts an earlier value of {key!r}; give one of them.")
        target = below
    if append:
        target.setdefault(last, []).extend(text.split(","))
    else:
        target[last] = _dotted_value(text)


def _dotted_value(text: str) -> Any:
    """JSON if it is JSON, else an integer such as ``8k``, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return human_int(text, "")
    except ConfigError:
        return text
