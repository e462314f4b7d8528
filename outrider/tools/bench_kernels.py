"""``outrider bench kernels``: runs the scripts of ``benchmarks/kernels`` one after the other, each in its own process.

Called by the command line, in a checkout: the scripts are no part of the installed package. Imports no torch itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from outrider.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
SHARED_CODE = "common"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="only the launch constants that are used")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write one JSON file per script there")


def run(args: argparse.Namespace) -> int:
    """Run the scripts; returns 1 if one of them failed. Raises ConfigError for an unknown name."""
    known = scripts()
    if unknown := [name for name in args.names if name not in known]:
        raise ConfigError(f"There is no kernel benchmark {unknown[0]!r}; choose from {', '.join(known)}.")
    failed = []
    for name in args.names or known:
        command = [sys.executable, "-m", f"benchmarks.kernels.{name}"]
        command += ["--quick"] if args.quick else []
        command += (
            ["--json", str(args.output_dir.resolve() / f"kernels_{name}.json")] if args.output_dir else []
        )
        if subprocess.run(command, cwd=REPO).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def scripts() -> list[str]:
    """Names of the scripts in the checkout. Raises ConfigError when the package was installed without them."""
    found = sorted(path.stem for path in (REPO / "benchmarks" / "kernels").glob("*.py"))
    if not found:
        raise ConfigError(
            "The kernel benchmarks are in the repository, not in the package; run from a checkout."
        )
    return [name for name in found if name not in (SHARED_CODE, "__init__")]
