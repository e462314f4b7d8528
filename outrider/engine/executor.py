"""How plans reach the devices: the narrow seam between the engine and the runner.

The engine knows only these two protocols, so it is tested with a fake as easily as with a GPU.
"""

from __future__ import annotations

from typing import Protocol

from outrider.types import StepPlan, StepResult


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Block until the sampled ids are on the host."""
        ...


class Executor(Protocol):
    """Runs plans in the order they are launched; later plans see the effects of earlier ones."""

    def launch(self, plan: StepPlan) -> StepHandle:
        """Queue a step on the device(s) and return at once where the device allows it."""
        ...

    def shutdown(self) -> None:
        """Free the devices; idempotent."""
        ...
