"""Tells the user, and whoever listens, what was found."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from lightning_sentinel.mesh import Worker
from lightning_sentinel.verification import Detection

__all__ = ["announce"]


def announce(trainer: L.Trainer, detections: Sequence[Detection], banned: Sequence[Worker], consequence: str) -> None:
    """Call ``on_sentinel_detection`` of callbacks and module, and print a line for every ban.

    Args:
        trainer: of the run.
        detections: of the step.
        banned: workers that the step bans.
        consequence: why, and what follows.
    """
    module = trainer.lightning_module
    listeners = [one for one in (*trainer.callbacks, module) if hasattr(one, "on_sentinel_detection")]  # type: ignore[attr-defined]
    for detection in detections:
        for listener in listeners:
            listener.on_sentinel_detection(trainer, module, detection)
    for worker in banned:
        # Unlike a log record this goes above the progress bar, not into it.
        module.print(f"Banned {worker} at step {trainer.strategy.step}: {consequence}")  # type: ignore[attr-defined]
