"""Documents that repeat what the code says are held to it here."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import outrider
from benchmarks.record import ABOUT
from outrider.cli.docs import with_tree
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
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme_tree_is_the_sources() -> None:
    """Guards against a module that the README's tree does not show, or describes as it was."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "outrider/engine/scheduler.py" in readme
    assert with_tree(readme) == readme, "stale: run `python -m outrider.cli.docs`"


def defined_names(path: Path) -> set[str]:
    """Classes, functions and ``Class.method`` of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = (n.name for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
            names |= {f"{node.name}.{name}" for name in inner}
    return names


def test_walk_names_things_that_exist() -> None:
    """Guards against a walk through rooms that have moved: each name is defined in one of its line's files."""
    text = (ROOT / "docs/walk.md").read_text(encoding="utf-8")
    num_names = 0
    for part in text.split("\n\n") + [row for row in text.splitlines() if row.startswith("| ")]:
        links = re.findall(r"\]\(\.\./(outrider/[\w/.]+)\)", part)
        known = set().union(*(defined_names(ROOT / link) for link in [*links, "outrider/types.py"]))
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", part):
            num_names += 1
            assert name in known, f"{name} is in none of {links}"
    assert num_names > 40


def test_links_of_the_documents_lead_somewhere() -> None:
    """Guards against links to files that were renamed, and against a number without its file."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
    rows = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- numbers")[1].split("<!-- end")[0]
    numbers = [row for row in rows.splitlines() if row.startswith("|")][2:]
    assert numbers and all("(benchmarks/results/" in row for row in numbers)


def strictly(path: Path) -> dict[str, Any]:
    """The file's JSON; ``ValueError`` for NaN and Infinity, which are none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path.name} holds {name}")

    return dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))


def test_results_say_what_they_are_of() -> None:
    """Guards against a figure that nobody can repeat: command, day, machine, versions; what is unknown has a note."""
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert files
    for path in files:
        result = strictly(path)
        assert not set(ABOUT) - set(result), f"{path.name} lacks {set(ABOUT) - set(result)}"
        unknown = [name for name in ABOUT if result[name] is None]
        assert not unknown or "note" in result, f"{path.name}: no note says why {unknown} are null"
        assert result["date"] and result["device"], path.name
        without_program = re.search(r'"(command|serve)": "-.*', path.read_text(encoding="utf-8"))
        assert not without_program, f"{path.name}: {without_program}"


def test_every_result_is_explained() -> None:
    """Guards against a results file that no document needs, or that is explained and gone."""
    folder = ROOT / "benchmarks/results"
    rows = re.findall(r"^\| `([\w.]+)` \|", (folder / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(path.name for path in folder.iterdir() if path.name != "README.md")
