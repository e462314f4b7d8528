"""Kernel tests run Triton's interpreter on machines without a GPU, and the kernels themselves with one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel files are first imported

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
