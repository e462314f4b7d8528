"""The texts of ``outrider serve --help`` and ``docs/flags.md``, both written from ``cli/options.py``.

Called by ``cli/serve.py`` (help) and by ``python -m outrider.cli.docs``. Pure text; imports nothing heavy.
"""

from __future__ import annotations

import json
import textwrap

from outrider.cli.options import Option, all_options
from outrider.errors import ConfigError

_USAGE = """\
usage: outrider serve [MODEL] [--config FILE.yaml] [flags]

Serve MODEL (a folder, a .gguf file or a hub id; the embedded SmolLM2-135M-Instruct when absent).
"""

_SPELLING = """\
`-` and `_` are the same in flags and keys, any unambiguous beginning of a flag is enough, `--flag value` and
`--flag=value` are the same. Integers may be written `8k` (8,000) or `8K` (8,192). Maps are JSON or dotted
keys (`--override-generation-config.temperature 0.2`). The key in a `--config` file is the flag without its
dashes; the command line wins over the file, the file over the default.
"""


def groups() -> dict[str, list[Option]]:
    """The options under their headings; those without effect come last in each."""
    table: dict[str, list[Option]] = {}
    for option in sorted(all_options().values(), key=lambda option: option.no_effect is not None):
        table.setdefault(option.group, []).append(option)
    return table


def serve_help(topic: str | None) -> str:
    """The help for ``--help`` (None: the headings), ``--help=all``, ``--help=Group`` or ``--help=word``."""
    if topic is None:
        counts = "".join(f"  {name:<20} {_names(options)}\n" for name, options in groups().items())
        hint = "--help=all shows every flag, --help=Group one group, --help=word the flags with that word.\n"
        return f"{_USAGE}\ngroups of flags:\n{counts}\n{hint}"
    wanted = topic.lower()
    if wanted == "all":
        chosen = groups()
    else:
        chosen = {name: options for name, options in groups().items() if name.lower() == wanted}
        chosen = chosen or _search(wanted.lstrip("-").replace("_", "-"))
    if not chosen:
        raise ConfigError(f"no flag or group has {topic!r} in its name or help; try --help=all.")
    blocks = [f"{name}:\n" + "".join(map(_entry, options)) for name, options in chosen.items()]
    return f"{_USAGE}\n" + "\n".join(blocks)


def flags_document() -> str:
    """The whole of ``docs/flags.md``."""
    lines = [
        "# Flags of `outrider serve`",
        "",
        "<!-- Written by `python -m outrider.cli.docs`. -->",
        "",
        _SPELLING,
    ]
    for name, options in groups().items():
        live = [option for option in options if option.no_effect is None]
        idle = [option for option in options if option.no_effect is not None]
        lines += [f"## {name}", ""]
        if live:
            lines += ["| flag | default | meaning |", "|---|---|---|", *map(_row, live), ""]
        if idle:
            lines += ["Accepted without effect:", ""]
            lines += [f"- `{option.flag}`: {option.no_effect}" for option in idle] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _search(word: str) -> dict[str, list[Option]]:
    found = {
        name: [o for o in options if word in o.key or word in o.metadata["help"].lower()]
        for name, options in groups().items()
    }
    return {name: options for name, options in found.items() if options}


def _names(options: list[Option]) -> str:
    live = [option.flag for option in options if option.no_effect is None]
    idle = len(options) - len(live)
    first = ", ".join(live[:2]) + (", ..." if len(live) > 2 else "")
    return f"{first}{' ' if first else ''}({len(live)} flags, {idle} without effect)"


def _form(option: Option) -> str:
    short = f"{option.metadata['short']}, " if "short" in option.metadata else ""
    if option.kind is bool:
        return f"{short}{option.flag}, --no-{option.key}"
    choices = option.metadata.get("choices")
    value = "{" + ",".join(choices) + "}" if choices else _PLACEHOLDER[option.kind]
    return f"{short}{option.flag} {value}"


_PLACEHOLDER: dict[type, str] = {int: "N", float: "X", str: "TEXT", list: "TEXT [TEXT ...]", dict: "JSON"}


def _default(option: Option) -> str:
    if option.kind is bool:
        return "on" if option.default else "off"
    if option.default in (None, "", [], {}):
        return ""
    return json.dumps(option.default) if option.kind in (list, dict) else str(option.default)


def _entry(option: Option) -> str:
    default = _default(option)
    text = option.metadata["help"] + (f" [{default}]" if default and option.no_effect is None else "")
    return (
        f"  {_form(option)}\n"
        + textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
        + "\n"
    )


def _row(option: Option) -> str:
    default = _default(option)
    cells = (f"`{_form(option)}`", f"`{default}`" if default else "", option.metadata["help"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
