"""``docs/operations.md`` and ``SECURITY.md`` against the code: every bound, default, path and signal."""

from __future__ import annotations

import ast
import importlib
import re
import signal
from dataclasses import fields
from typing import Any

import pytest

from outrider.config import EngineConfig, ServerConfig, flag_name
from outrider.engine import process
from outrider.server import middleware
from tests.reliability.server import ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
BOUNDS = re.findall(r"\| ([\d.]+) \| `([\w.]+)\.(\w+)` \|", OPERATIONS)
DEFAULTS = {flag_name(f.name): f for config in (EngineConfig, ServerConfig) for f in fields(config)}


@pytest.mark.parametrize(("value", "module", "name"), BOUNDS, ids=[name for _, _, name in BOUNDS])
def test_bounds_are_as_documented(value: str, module: str, name: str) -> None:
    """Guards against a bound that was changed in one place only."""
    actual: Any = getattr(importlib.import_module(f"outrider.{module}"), name)
    assert float(value) == float(actual)


def test_every_bound_of_a_connection_and_request_is_documented() -> None:
    """Guards against a new bound that operators cannot find."""
    documented = {(module, name) for _, module, name in BOUNDS}
    for module in (
        "cli.http_protocol",
        "engine.streams",
        "engine.backlog",
        "engine.liveness",
        "server.protocol",
    ):
        path = ROOT / "outrider" / (module.replace(".", "/") + ".py")
        for node in ast.parse(path.read_text()).body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.BinOp)):
                continue
            name = ast.unparse(node.targets[0])
            if re.fullmatch(r"[A-Z][A-Z_]+", name) and name != "TICK_S":
                assert (module, name) in documented, (module, name)


def test_flags_and_defaults_are_as_documented() -> None:
    """Guards against flags that do not exist, and defaults that changed."""
    for flag in re.findall(r"`(--[\w-]+)`", OPERATIONS + SECURITY):
        assert flag in DEFAULTS or flag == "--trust-remote-code", flag
    rows = re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", OPERATIONS, re.MULTILINE)
    assert len(rows) >= 4
    for flag, default in rows:
        expected = DEFAULTS[flag].default
        assert expected is None if default == "measured" else float(default) == float(expected), flag


def test_open_paths_are_as_documented() -> None:
    """Guards against a route that needs no key and is not named."""
    named = re.search(r"every route needs it but (.*?)\.", SECURITY.replace("\n", " "))
    assert named and set(re.findall(r"`(/\w+)`", named[1])) == middleware.OPEN_PATHS


def test_signals_are_as_documented() -> None:
    """Guards against a signal whose meaning is only in the code."""
    source = ast.unparse(ast.parse((ROOT / "outrider" / "engine" / "process.py").read_text()))
    assert "signal.signal(signal.SIGTERM, signal.SIG_IGN)" in source
    assert "signal.signal(signal.SIGINT, signal.SIG_IGN)" in source
    assert "faulthandler.register(signal.SIGUSR1, all_threads=True)" in source
    for name in set(re.findall(r"`(SIG\w+)`", OPERATIONS)):
        assert hasattr(signal, name)
    assert process.HEARTBEAT_S < 8
