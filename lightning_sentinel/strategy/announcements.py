"""Tells the user, and whoever listens, what was found."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from lightning_sentinel.config import Response
from lightning_sentinel.mesh import Worker
from lightning_sentinel.verification import Detection

__all__ = ["announce_bans", "announce_detections", "consequence"]


def consequence(response: Response, left: int, replicas: int) -> str:
    """Why workers are banned, and what becomes of their work.

    Args:
        response: what the user chose.
        left: pipelines that go on.
        replicas: pipelines in all.

    Example:
        >>> consequence(Response(), left=1, replicas=2)
        'flagged in 5 steps in a row; its work is dealt to others. 1 of 2 pipelines go on.'
    """
    if response.audit_rate is not None:
        why, then = "what it sent is not what another worker recomputed", "the step is done again without it"
    else:
        why, then = f"flagged in {response.ban_after} steps in a row", "its work is dealt to others"
    return f"{why}; {then}. {left} of {replicas} pipelines go on."


def announce_detections(trainer: L.Trainer, detections: Sequence[Detection]) -> None:
    """Call ``on_sentinel_detection`` of callbacks and module."""
    module = trainer.lightning_module
    listeners = [one for one in (*trainer.callbacks, module) if hasattr(one, "on_sentinel_detection")]  # type: ignore[attr-defined]
    for detection in detections:
        for listener in listeners:
            listener.on_sentinel_detection(trainer, module, detection)


def announce_bans(trainer: L.Trainer, banned: Sequence[Worker], why: str) -> None:
    """Print a line for every ban.

    Args:
        trainer: of the run.
        banned: workers that the step bans.
        why: and what follows; see :func:`consequence`.
    """
    for worker in banned:
        # Unlike a log record this goes above the progress bar, not into it.
        trainer.lightning_module.print(f"Banned {worker} at step {trainer.strategy.step}: {why}")  # type: ignore[attr-defined]
