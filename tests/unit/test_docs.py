"""Documents that repeat what the code says are held to it here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import outrider
from outrider.cli.help import flags_document
from outrider.cli.options import all_options

ROOT = Path(__file__).resolve().parents[2]


def test_docs_flags_is_what_the_config_says() -> None:
    """Guards against a flag that was added or changed without its page."""
    written = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    assert written == flags_document(), "stale: run `python -m outrider.cli.docs`"


def test_docs_command_writes_every_flag(tmp_path: Path) -> None:
    """Guards against a generator that skips a group: each flag must be in the page it writes."""
    target = tmp_path / "flags.md"
    subprocess.run([sys.executable, "-m", "outrider.cli.docs", str(target)], check=True, cwd=ROOT)
    page = target.read_text(encoding="utf-8")
    assert [o.flag for o in all_options().values() if f"{o.flag}" not in page] == []


def test_changelog_begins_with_the_version() -> None:
    """Guards against a release whose changes are written under another number."""
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == outrider.__version__


def test_contributing_names_things_that_exist() -> None:
    """Guards against directions to a file or make target that has been renamed."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:outrider|tests|docs|benchmarks)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
