"""Faults that only the inside of a process can have; on the server's PYTHONPATH in tests, never shipped.

SIGUSR2 pauses the main thread for ``$FAULT_PAUSE_S`` seconds, as a stuck device call would. ``$FAULT_COMMIT_AT``
makes the engine raise while it takes in a token of any request with that ``max_tokens``; ``$FAULT_ADD_AT`` while it
takes in such a request, ``$FAULT_LAUNCH_AT`` while it launches a step that starts one.
"""

import ctypes
import os
import signal
import sys
import time


def pause(number, frame):
    time.sleep(float(os.environ.get("FAULT_PAUSE_S", "20")))


def break_engine():
    from outrider.engine import engine, scheduler

    commit_at = int(os.environ.get("FAULT_COMMIT_AT", "-1"))
    add_at = int(os.environ.get("FAULT_ADD_AT", "-1"))
    launch_at = int(os.environ.get("FAULT_LAUNCH_AT", "-1"))
    commit, add, launch = scheduler.Scheduler._end_of, engine.Engine.add, engine.Engine._launch

    def broken_commit(self, seq, token_id):
        if seq.request.sampling.max_tokens == commit_at:
            raise RuntimeError(f"a secret at {id(self):#x} in {__file__}")
        return commit(self, seq, token_id)

    def broken_add(self, request):
        if request.sampling.max_tokens == add_at:
            raise RuntimeError(f"a secret at {id(self):#x} in {__file__}")
        return add(self, request)

    class BrokenExecutor:
        def __init__(self, executor):
            self.executor = executor

        def launch(self, step):
            if any(row.sampling.max_tokens == launch_at for row in step.new_rows):
                raise RuntimeError(f"a secret at {id(self):#x} in {__file__}")
            return self.executor.launch(step)

        def shutdown(self):
            self.executor.shutdown()

    def broken_launch(self, plan):
        if not isinstance(self.executor, BrokenExecutor):
            self.executor = BrokenExecutor(self.executor)
        return launch(self, plan)

    scheduler.Scheduler._end_of = broken_commit
    engine.Engine.add = broken_add
    engine.Engine._launch = broken_launch


if "serve" in sys.orig_argv:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a test run that is killed leaves no server behind

if "outrider.engine.process" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, pause)
    if any(name.endswith("_AT") and name.startswith("FAULT_") for name in os.environ):
        break_engine()
