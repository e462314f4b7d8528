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


NO_BOUNDS = {
    ("engine.liveness", "TICK_S"): "how often the watch looks",
    ("engine.process", "NEWS_S"): "how often progress is told",
    ("engine.guidance", "PATIENCE_S"): "how long a step waits for a mask before it goes on without the row",
    ("cli.progress", "LINE_INTERVAL_S"): "how often a line is logged",
    ("cli.stats_line", "INTERVAL_S"): "how often a line is logged",
    ("server.context", "THREAD_THRESHOLD_CHARS"): "where the work is done, not whether",
    ("text.ranked_bpe", "MAX_CHARS"): "which library does the work, not whether",
    ("server.completions", "DEFAULT_MAX_TOKENS"): "the default of the API",
    ("cli.docs", "MAX_COMMENT"): "writes documents",
}
LOOKS_LIKE_A_BOUND = re.compile(r"(?:[A-Z]+_)*(?:MAX|MIN|LIMIT|BYTES|CHARS|TIMEOUT|S|GUESS)(?:_[A-Z]+)*")


def test_every_bound_in_the_code_is_documented() -> None:
    """Guards against a new bound that operators cannot find."""
    documented = {(module, name) for _, module, name in BOUNDS}
    seen = set()
    for path in sorted((ROOT / "outrider").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "outrider").with_suffix("").parts)
        if module.partition(".")[0] not in ("cli", "engine", "server", "text"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.BinOp)):
                continue
            name = ast.unparse(node.targets[0])
            is_number = not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str))
            if is_number and LOOKS_LIKE_A_BOUND.fullmatch(name):
                seen.add((module, name))
                assert (module, name) in documented | NO_BOUNDS.keys(), (module, name)
    assert len(seen) > 40 and NO_BOUNDS.keys() <= seen


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
