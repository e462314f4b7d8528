"""What every file in ``results`` says of its run, how it is written, and how a benchmark ends that cannot run.

Used by all benchmarks: a figure without its command, machine, date and versions can be compared with nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from outrider.errors import ConfigError, OutriderError
from outrider.tools.bench_kernels import no_cuda

ABOUT = ("command", "date", "device", "torch", "triton")
"""What no file in ``results`` may lack; ``tests/unit/test_docs.py`` reads them all."""


def about(module: str, argv: Sequence[str] | None = None, device: str | None = None) -> dict[str, Any]:
    """The fields ``ABOUT`` and ``python`` of this run.

    ``module`` is what stands behind ``python -m``, ``argv`` its arguments (default: this process's). ``device`` is what
    the figures are of (default: the GPU, or else the CPU). Call it when a server that needs the whole GPU has ended.
    """
    import torch  # here: what measures a server needs no torch until the server has ended

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": as_typed([sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "device": device or gpu or cpu(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
    }


def as_typed(command: Sequence[str]) -> str:
    """A command of this interpreter, as one would type it."""
    return shlex.join(["python", *command[1:]])


def triton_version() -> str | None:
    """None where Triton is not installed: it has no builds for some systems."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor as the kernel names it, and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def as_json(result: object) -> str:
    """The text of a results file. ``ValueError`` for a NaN or an infinity, which JSON has not."""
    return json.dumps(result, indent=1, allow_nan=False) + "\n"


def write(path: Path | None, result: object) -> None:
    """Write ``result`` to ``path``, whose folders are made; None is no file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(result), encoding="utf-8")


def need_cuda(what: str) -> None:
    """``ConfigError`` naming ``what`` where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise no_cuda(what)


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """End the process with what ``main`` returns; a deliberate error is one sentence and exit code 2, or 1."""
    try:
        sys.exit(main())
    except OutriderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
