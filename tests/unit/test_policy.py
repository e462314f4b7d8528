"""The rules of the house as tests: who imports whom, how long a file may be, what is never called.

Each rule reads the sources with ``ast``; a failure names file and line.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import outrider

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "outrider"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# Modules that any room may import, and that import only each other.
LEAVES = ("types", "errors", "config", "logs", "kv_layout", "parallel", "startup", "models.config")

# room -> rooms it may import besides the leaves and itself. The first match in the order given decides.
ROOMS: dict[str, tuple[str, ...]] = {
    "__main__": ("cli",),
    "cli": ("server", "text", "engine.client", "engine.protocol", "models.config_hf", "models.gguf"),
    "tools": ("cli", "text", "engine", "runner", "models.config_hf", "models.gguf", "kernels"),
    "server": ("text", "engine.client", "engine.protocol", "models.config_hf"),
    "text": ("models.gguf",),
    "engine.client": (
        "engine.protocol",
        "engine.messages",
        "engine.streams",
        "engine.liveness",
        "engine.backlog",
    ),
    "engine.process": ("engine", "runner.setup"),
    "engine.guidance": ("engine", "text"),
    "engine": (),
    "runner": ("engine", "models", "quant", "kernels"),
    "models": ("quant", "kernels"),
    "quant": ("kernels",),
    "kernels": (),
    "": (),
}

# No torch in these, neither at the top nor inside a function.
TORCH_FREE = (
    "types",
    "errors",
    "config",
    "logs",
    "kv_layout",
    "models.config",
    "models.config_hf",
    "models.gguf",
    "cli",
    "server",
    "text",
    "tools",
    "engine",
    "__main__",
)

FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "transformers")
FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "np.load",
    "numpy.load",
)

PUBLIC_NAMES = ["OutriderError", "Request", "SamplingParams", "TokenEvent", "__version__"]


def module_name(path: Path) -> str:
    """``outrider/engine/blocks.py`` -> ``engine.blocks``; the package itself is ``""``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def within(name: str, room: str) -> bool:
    """Whether the module is the room or inside it."""
    return name == room or name.startswith(room + ".")


def tree_of(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Everything under ``if TYPE_CHECKING:``."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of everything a file imports at run time, wherever the import stands."""
    tree = tree_of(path)
    skipped = typing_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*full.split("."))).with_suffix(".py").exists()
                is_package = (ROOT / Path(*full.split("."))).is_dir()
                yield node.lineno, full if is_module or is_package else str(node.module)


def room_of(name: str) -> str:
    """The row of ``ROOMS`` that a module belongs to."""
    return next(room for room in ROOMS if within(name, room) or room == "")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    """Guards against cycles and shortcuts between rooms, such as a scheduler that reaches into the runner."""
    name = module_name(path)
    allowed = LEAVES if name in LEAVES else (*LEAVES, room_of(name), *ROOMS[room_of(name)])
    if name == "":
        allowed = LEAVES
    for line, target in imports(path):
        if target.split(".")[0] != "outrider" or target == "outrider":
            continue
        inner = target.removeprefix("outrider.")
        assert any(within(inner, room) for room in allowed), (
            f"{path.relative_to(ROOT)}:{line} imports {target}; {name or 'the package'} may import {allowed}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_torch_above_the_runner(path: Path) -> None:
    """Guards against a scheduler, server or command that needs torch, also inside a function."""
    name = module_name(path)
    if not any(within(name, room) for room in TORCH_FREE):
        return
    for line, target in imports(path):
        assert target.split(".")[0] not in ("torch", "triton"), (
            f"{path.relative_to(ROOT)}:{line} imports {target}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_short_and_have_a_door_sign(path: Path) -> None:
    """Guards against files that nobody reads to the end, and against files that do not say what they are."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; split it"
    assert ast.get_docstring(tree_of(path)), f"{path.relative_to(ROOT)} has no module docstring"


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public classes, functions and methods without a docstring (overloads and dunders aside)."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_names_are_documented(path: Path) -> None:
    """Guards against a public name whose contract is only in its author's head."""
    missing = list(undocumented(tree_of(path).body))
    assert not missing, f"{path.relative_to(ROOT)}: {', '.join(missing)}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_can_run_what_a_user_sends(path: Path) -> None:
    """Guards against deserializers and evaluators that execute their input; model.eval() is no such thing."""
    for line, target in imports(path):
        assert target.split(".")[0] not in FORBIDDEN_IMPORTS, (
            f"{path.relative_to(ROOT)}:{line} imports {target}"
        )
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{path.relative_to(ROOT)}:{node.lineno} calls {called}"
            shell = [k for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) != "False"]
            assert not shell, f"{path.relative_to(ROOT)}:{node.lineno} runs a shell"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_unfinished_business(path: Path) -> None:
    """Guards against notes to self that ship."""
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
        assert word not in text, f"{path.relative_to(ROOT)} contains {word}"


def tile_tables(path: Path) -> Iterator[tuple[int, str]]:
    """``(line, docstring below it)`` of every module constant whose name ends in TILE or TILES."""
    body = tree_of(path).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        if any(re.search(r"(^|_)TILES?$", name) for name in names):
            value = below.value if isinstance(below, ast.Expr) else None
            yield node.lineno, str(value.value) if isinstance(value, ast.Constant) else ""


def test_tile_tables_say_where_and_when_they_were_measured() -> None:
    """Guards against launch constants that nobody can tell from guesses: a GPU and a date, or that there is none."""
    tables = [
        (path, line, text)
        for path in SOURCES
        if path.parent.name == "kernels"
        for line, text in tile_tables(path)
    ]
    assert len(tables) > 10
    for path, line, text in tables:
        measured = re.search(r"\b[HB]\d{3}\b", text) and re.search(r"\b20\d\d-\d\d-\d\d\b", text)
        assert measured or re.search(r"not (yet )?(measured|timed)", text, re.IGNORECASE), (
            f"{path.relative_to(ROOT)}:{line}: say on which GPU and when this was measured, or that it was not"
        )


def test_public_names_are_frozen() -> None:
    """Guards against a name that users import and that disappears, or one that slips out."""
    assert sorted(outrider.__all__) == PUBLIC_NAMES
    assert all(hasattr(outrider, name) for name in PUBLIC_NAMES)


def fields_read() -> set[str]:
    """Every attribute name that some source reads."""
    trees = [tree_of(path) for path in SOURCES]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_setting_has_an_effect_or_says_that_it_has_none() -> None:
    """Guards against a flag that is accepted in silence and read by nobody."""
    from outrider.cli.options import all_options

    read = fields_read()
    silent = [o.flag for o in all_options().values() if o.no_effect is None and o.name not in read]
    assert not silent, f"declare in cli/ignored.py or implement: {silent}"


def seconds(code: str) -> float:
    """CPU time of the best of five fresh interpreters that run ``code``, their own start included."""
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return min(times)


@pytest.mark.parametrize(
    "code",
    [
        "import outrider",
        "from outrider.cli.commands import main; main(['--help'])",
        "from outrider.cli.commands import main; main(['serve', '--help=all'])",
    ],
)
def test_start_is_quick_and_without_torch(code: str) -> None:
    """Guards against an import that makes every command wait: under 0.3 s, interpreter included."""
    check = f"{code}\nimport sys; assert not {{'torch', 'numpy', 'fastapi'}} & set(sys.modules)"
    assert seconds(check) < 0.3
