"""The callbacks that the strategy adds to the Trainer's."""

from __future__ import annotations

import lightning as L

from lightning_sentinel.callbacks.monitor import SentinelMonitor
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.results.metrics import SharedMetrics
from lightning_sentinel.pipeline.results.step_state import SharedStepState
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.strategy.signals import DeferredSignals

__all__ = ["add_callbacks", "shared_metrics"]


def add_callbacks(run: RunState, trainer: L.Trainer, signals: DeferredSignals) -> None:
    """Add those callbacks that an earlier run has not added.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        signals: handles process signals between two batches.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not run.settings.virtual and shared_metrics(trainer) is None:
        _add_sharing(run, callbacks)
    if run.position not in callbacks:
        callbacks += [run.position, signals]
    if run.settings.verification is not None and not any(isinstance(callback, SentinelMonitor) for callback in callbacks):
        # Detections are logged by default, as Lightning shows a progress bar by default.
        callbacks.append(SentinelMonitor())


def shared_metrics(trainer: L.Trainer) -> SharedMetrics | None:
    """The callback that computes metrics over all ranks; ``None`` on a virtual mesh."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, SharedMetrics)), None)


def _add_sharing(run: RunState, callbacks: list[L.Callback]) -> None:
    mesh = run.mesh
    watching = run.processes.watching

    def banned() -> frozenset[Worker]:
        return run.ledger.banned

    # First, so that the hooks of all other callbacks see the shared state.
    callbacks[:0] = [SharedStepState(mesh, banned, watching), SharedMetrics(mesh, banned, watching, run.settings.timeout)]
