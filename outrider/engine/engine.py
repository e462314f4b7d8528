"""The engine's heart: ``schedule -> launch -> commit``, plain or overlapped.

Called by ``process`` (one loop in its own process) and by the offline benches. Both loops make the same three
calls; the overlapped one launches step n+1 before it reads step n's tokens, so the host's work hides behind
the device's. The plain loop is its oracle: both give the same greedy ids.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from outrider.engine.executor import Executor, StepHandle
from outrider.engine.grammar import GrammarCompiler
from outrider.engine.plan import Plan
from outrider.engine.scheduler import Scheduler
from outrider.errors import EngineError
from outrider.types import FINISH_ERROR, EngineStats, Request, TokenEvent

MAX_FAILED_LAUNCHES = 3
"""So many failures in a row are the device's, not a request's."""

logger = logging.getLogger("outrider.engine")


class Engine:
    """Owns the scheduler and drives the executor; ``depth`` 1 is the plain loop, 2 the overlapped one."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, compiler: GrammarCompiler | None, depth: int
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._compiler = compiler
        self._depth = depth
        self._in_flight: deque[tuple[Plan, StepHandle]] = deque()
        self._last_commit = time.perf_counter()
        self._num_failed = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` could still bring events."""
        compiling = self._compiler is not None and self._compiler.num_pending > 0
        return self.scheduler.has_work or bool(self._in_flight) or compiling

    @property
    def is_launching(self) -> bool:
        """Whether a launched step is waiting to be read."""
        return bool(self._in_flight)

    def add(self, request: Request) -> list[TokenEvent]:
        """Take a request in; events come back only if it can never run here."""
        if request.sampling.grammar is not None:
            if self._compiler is None:
                return [
                    _failed(request, "This model's tokenizer cannot be constrained; drop response_format.")
                ]
            self._compiler.start(request)
            return []
        event = self.scheduler.add(request)
        return [event] if event is not None else []

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request early, in whatever state it is."""
        if self._compiler is not None:
            self._compiler.cancel(request_id)
        event = self.scheduler.abort(request_id)
        return [event] if event is not None else []

    def step(self) -> list[TokenEvent]:
        """Advance by one step: launch the next plan, then commit the oldest one if the pipe is full.

        Returns the events of the committed step; an empty list when there was nothing to commit.
        """
        events = self._collect_grammars()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._note_started(plan)
            events += self._launch(plan)
        if self._in_flight and (plan is None or len(self._in_flight) >= self._depth):
            oldest, handle = self._in_flight.popleft()
            events += self.scheduler.commit(oldest, handle.wait())
            now = time.perf_counter()
            self.scheduler.stats.last_step_s = now - self._last_commit
            self._last_commit = now
        return events

    def _note_started(self, plan: Plan) -> None:
        now = time.monotonic()
        for seq in plan.started:
            seq.queue_s = (
                seq.queue_s or now - seq.request.arrival_s
            )  # a preempted sequence has started before

    def _launch(self, plan: Plan) -> list[TokenEvent]:
        """Launch a plan. An exception before it reached the device ends its sequences; a broken device ends us."""
        try:
            self._in_flight.append((plan, self.executor.launch(plan.step)))
        except (OSError, EngineError):
            raise  # ranks that got the plan and ranks that did not are no longer in step
        except Exception:
            self._num_failed += 1
            if self._num_failed > MAX_FAILED_LAUNCHES:
                raise
            logger.exception("A step could not be launched; its %d requests end.", len(plan.sequences))
            return self.scheduler.fail(plan)
        self._num_failed = 0
        return []

    def stats(self) -> EngineStats:
        """A snapshot for the metrics."""
        stats = self.scheduler.update_stats()
        stats.num_compiling = self._compiler.num_pending if self._compiler is not None else 0
        return stats

    def shutdown(self) -> None:
        """Let the launched steps end, then free the devices."""
        while self._in_flight:
            self._in_flight.popleft()[1].wait()
        if self._compiler is not None:
            self._compiler.close()
        self.executor.shutdown()

    def _collect_grammars(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        if self._compiler is not None:
            for request, grammar, error in self._compiler.collect():
                refused = self.scheduler.add(request, grammar) if error is None else _failed(request, error)
                if refused is not None:
                    events.append(refused)
        return events


def _failed(request: Request, error: str) -> TokenEvent:
    return TokenEvent(request.request_id, [], FINISH_ERROR, error=error, error_status=400)
