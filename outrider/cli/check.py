"""``outrider check FILE.yaml``: every error of a settings file at once, without a GPU and without a model.

Called by ``cli/commands.py``. The file is held against the JSON schema of ``cli/schema.py``, each value is
converted as ``serve`` would, and settings that contradict each other are reported too. Starts nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from outrider.cli.options import all_options
from outrider.cli.parser import Parser, Settings, build_settings, field_of_key, load_yaml, yaml_setting
from outrider.cli.schema import config_schema
from outrider.errors import ConfigError


def run(argv: list[str]) -> int:
    """The command: 0 when the file can be used, 2 when it cannot."""
    parser = Parser(prog="outrider check", description="Check a YAML file of settings, report every error.")
    parser.add_argument("file", nargs="?", type=Path, help="the file that 'serve --config' would read")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of such files instead")
    args = parser.parse_all(argv)
    if args.schema:
        print(json.dumps(config_schema(), indent=2))
        return 0
    if args.file is None:
        raise ConfigError("name the file to check: outrider check FILE.yaml.")
    faults, settings = check_file(args.file)
    for line, sentence in faults:
        print(f"{args.file}:{line}: {sentence}" if line else f"{args.file}: {sentence}", file=sys.stderr)
    if settings is None:
        print(f"{args.file}: {len(faults)} error{'s' if len(faults) > 1 else ''}.", file=sys.stderr)
        return 2
    for note in settings.notes:
        print(f"{args.file}: {note}")
    print(f"{args.file}: {len(settings.given)} settings, no errors.")
    return 0


def check_file(path: Path) -> tuple[list[tuple[int, str]], Settings | None]:
    """Faults as ``(line, sentence)`` in the order of the file (line 0: of the whole), or the settings."""
    content = load_yaml(path)
    lines, faults = _key_lines(path)
    settings: dict[str, Any] = {}
    for key, value in content.items():
        fault = _convert(str(key), value, settings)
        if fault:
            faults.append((lines.get(str(key), 0), fault))
    blamed = {line for line, _ in faults}
    faults += [(line, text) for line, text in _schema_faults(content, lines) if line not in blamed]
    built: Settings | None = None
    try:
        built = build_settings(settings)
    except ConfigError as error:
        faults.append((0, str(error)))
    return sorted(faults), built if not faults else None


def _convert(key: str, value: Any, settings: dict[str, Any]) -> str | None:
    """Put the setting into ``settings``, or say what is wrong with it."""
    try:
        name, converted = yaml_setting(key, value)
    except ConfigError as error:
        return str(error)
    fault = all_options()[name].fault(converted)
    if fault is None:
        settings[name] = converted
    return fault


def _schema_faults(content: dict[Any, Any], lines: dict[str, int]) -> list[tuple[int, str]]:
    from jsonschema import Draft202012Validator

    faults = []
    for error in Draft202012Validator(config_schema()).iter_errors({str(k): v for k, v in content.items()}):
        if error.absolute_path:  # unknown keys, which have no path, have their own sentence already
            key = str(error.absolute_path[0])
            faults.append((lines.get(key, 0), f"{key}: {error.message}."))
    return faults


def _key_lines(path: Path) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The line of each top-level key, and a fault for each setting that is given twice."""
    import yaml

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    lines: dict[str, int] = {}
    faults: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for key_node, _ in node.value if node else []:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        lines[key] = line
        try:
            name = field_of_key(key)[0]
        except ConfigError:
            name = key
        if name in seen:
            faults.append((line, f"{key} was already given in line {seen[name]}; keep one of them."))
        seen.setdefault(name, line)
    return lines, faults
