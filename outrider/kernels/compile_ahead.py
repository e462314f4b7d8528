"""Compiles many kernels at once: inside ``compiling``, launches are handed to threads as compile jobs and do not run.

Used by the runner's start-up alone. Triton compiles a kernel when it is first launched, one after the other; a forward
pass inside this block only collects what it would launch, so that all processor cores compile at the same time. What
such a pass computes is meaningless.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction

MAX_THREADS = 32
"""Not tuned. H200 with 16 cores, 2026-11-26: a first launch 20.9 s, compiling kernel by kernel 73 (docs/log.md)."""


@contextmanager
def compiling() -> Iterator[None]:
    """Collect launches instead of running them; on leaving, wait until every collected kernel is compiled."""
    launch = JITFunction.run

    def collect(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads, AsyncCompileMode(threads):
        # Triton has no public switch for launches that only compile.
        JITFunction.run = collect
        try:
            yield
        finally:
            JITFunction.run = launch
