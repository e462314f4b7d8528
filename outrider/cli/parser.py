"""Command line and YAML file -> the two configs. The argparse parser is generated from ``cli/options.py``.

Called by ``cli/serve.py`` and by tools that take engine flags. Precedence: command line, YAML file, defaults.
Anything that cannot be used raises ConfigError with one sentence; nothing here prints or exits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from outrider.cli.argv import merge_maps, normalize
from outrider.cli.options import Option, all_options, nearest
from outrider.config import EngineConfig, ServerConfig
from outrider.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What a command line asked for.

    ``given`` holds the settings that differ from silence (by field name, secrets hidden); ``notes`` has one
    sentence for each flag that was accepted and has no effect.
    """

    engine: EngineConfig
    server: ServerConfig
    given: dict[str, Any]
    notes: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError with a sentence instead of printing usage and exiting."""

    def parse_all(self, argv: list[str]) -> argparse.Namespace:
        """Parse ``argv``; an argument that is not known is refused with the nearest flag."""
        namespace, unknown = self.parse_known_args(argv)
        if not unknown:
            return namespace
        name = next((token.split("=")[0] for token in unknown if token.startswith("-")), None)
        if name is None:
            raise ConfigError(f"{unknown[0]!r} is one argument too many for {self.prog}.")
        raise ConfigError(f"{name} is not a flag of {self.prog}{nearest(name, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into a ConfigError."""
        flag, ignored, value = message.partition(": ignored explicit argument ")
        if ignored:
            long = flag.removeprefix("argument ").split("/")[0].split(",")[0]
            raise ConfigError(f"{long} takes no value ({value}); write {long} or --no-{long[2:]}.")
        raise ConfigError(message.removeprefix("argument ").rstrip(".") + ".")


def parse_serve(argv: list[str]) -> Settings:
    """The configs for ``outrider serve ARGV``."""
    tokens, maps = normalize(argv)
    given = vars(build_parser().parse_all(tokens))
    positional = given.pop("model_tag", None)
    files = given.pop("config", [])
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; put all settings into one file.")
    settings = read_yaml(Path(files[0])) if files else {}
    settings.update(given)
    if positional is not None:
        settings["model"] = positional
    for name, entries in maps.items():
        settings[name] = merge_maps(settings.get(name) or {}, entries)
    return build_settings(settings)


def build_settings(settings: dict[str, Any]) -> Settings:
    """Check converted values and put each into the config that owns it."""
    options = all_options()
    faults = [fault for name, value in settings.items() if (fault := options[name].fault(value))]
    if faults:
        raise ConfigError(faults[0])

    def part(config: type) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if options[name].config is config}

    notes = [f"{o.flag} has no effect here: {o.no_effect}." for n in settings if (o := options[n]).no_effect]
    shown = {n: "***" if options[n].metadata.get("secret") else v for n, v in settings.items()}
    return Settings(
        EngineConfig(**part(EngineConfig)), ServerConfig(**part(ServerConfig)), shown, tuple(notes)
    )


def build_parser() -> Parser:
    """The argparse parser of ``serve``; every default is suppressed, so the result holds what was typed."""
    parser = Parser(prog="outrider serve", add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--config", action="append")
    for item in all_options().values():
        add_option(parser, item)
    return parser


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Give another command's parser all engine flags; read them back with ``engine_config_of``."""
    for item in all_options().values():
        if item.config is EngineConfig:
            add_option(parser, item, help=item.metadata["help"])


def engine_config_of(namespace: argparse.Namespace) -> EngineConfig:
    """The EngineConfig of a parser that was given ``add_engine_arguments``."""
    names = [n for n, item in all_options().items() if item.config is EngineConfig and hasattr(namespace, n)]
    return build_settings({name: getattr(namespace, name) for name in names}).engine


def add_option(parser: argparse.ArgumentParser, item: Option, help: str | None = None) -> None:
    """Add one option to an argparse parser, absent from the namespace unless typed."""
    flags = [item.flag, *([item.metadata["short"]] if "short" in item.metadata else [])]
    common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help}
    if item.kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
    elif item.kind is list and not item.metadata.get("json"):
        action = "append" if item.metadata.get("repeat") else "store"
        nargs = None if item.metadata.get("repeat") else "+"
        parser.add_argument(*flags, action=action, nargs=nargs, **common)
    else:
        parser.add_argument(*flags, type=_converter(item), metavar=item.name.upper(), **common)


def _converter(item: Option) -> Any:
    def convert(text: str) -> Any:
        return item.from_text(text)

    return convert


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a ``--config`` file by field name; false means false."""
    content = load_yaml(path)
    try:
        return dict(yaml_setting(str(key), value) for key, value in content.items())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_yaml(path: Path) -> dict[Any, Any]:
    """The file's top-level map; ConfigError when there is none."""
    import yaml

    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} must be a .yaml or .yml file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, not a {type(content).__name__}.")
    return content


def field_of_key(key: str) -> tuple[str, bool]:
    """The field that a YAML key names and whether the key is its ``no-`` form; ConfigError if unknown."""
    options = all_options()
    name = key.replace("-", "_")
    if name in options:
        return name, False
    if name == "disable_log_requests":
        return "enable_log_requests", True
    if name.startswith("no_") and name[3:] in options and options[name[3:]].kind is bool:
        return name[3:], True
    raise ConfigError(f"{key} is not a setting{nearest(key, [o.key for o in options.values()])}")


def yaml_setting(key: str, value: Any) -> tuple[str, Any]:
    """The field and the converted value of one line of a YAML file."""
    name, negated = field_of_key(key)
    converted = all_options()[name].from_yaml(value)
    return name, not converted if negated else converted
