"""The executor of a single rank: the runner lives in the engine's own process.

Implements ``engine.executor.Executor``. Several ranks are ``runner.workers``.
"""

from __future__ import annotations

from outrider.runner.model_runner import LaunchedStep, ModelRunner
from outrider.types import StepPlan


class InlineExecutor:
    """Launches on this process's device; on a CPU the launch itself computes."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue the step."""
        return self.runner.launch(plan)

    def shutdown(self) -> None:
        """Nothing to end: the device's memory goes with the process."""
