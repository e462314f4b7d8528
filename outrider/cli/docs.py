"""Writes what the documents repeat from the code: ``python -m outrider.cli.docs [FILE]``.

``docs/flags.md`` comes from the config dataclasses, the tree in ``README.md`` from the first sentence of each module.
Run in the working tree after changing either; a test fails while one of them is stale.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from outrider.cli.help import flags_document

PACKAGE = Path(__file__).resolve().parents[1]
MAX_COMMENT = 100
_TREE = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- end of tree -->)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Write the flags to ``argv[0]``, by default to the working tree, where the README's tree is renewed too."""
    path = Path(argv[0]) if argv else PACKAGE.parent / "docs" / "flags.md"
    path.write_text(flags_document(), encoding="utf-8")
    if not argv:
        readme = PACKAGE.parent / "README.md"
        readme.write_text(with_tree(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def with_tree(readme: str) -> str:
    """The README with its tree as the sources are now."""
    return _TREE.sub(lambda _: f"```\n{source_tree()}```\n", readme)


def source_tree() -> str:
    """One line a module, its comment beside it, folder by folder."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (len(p.relative_to(PACKAGE).parts), p)):
        name = path.relative_to(PACKAGE.parent).as_posix()
        if path.name != "__init__.py":
            lines.append(f"{name:<40} {_comment(path)}\n")
    return "".join(lines)


def _comment(path: Path) -> str:
    """The first sentence of a module's docstring, cut at a comma or colon if it is long."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    sentence = re.split(r"[.;] |\.$", text)[0].replace("``", "")
    if len(sentence) <= MAX_COMMENT:
        return sentence
    cut = max(sentence.rfind(mark, 0, MAX_COMMENT) for mark in (",", ":", " "))
    marks = [sentence.rfind(mark, 20, MAX_COMMENT) for mark in (": ", ", ")]
    return sentence[: max(marks) if max(marks) > 0 else cut]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
