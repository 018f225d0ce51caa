"""What ranks decide about a step once they have judged it."""

from __future__ import annotations

from typing import NamedTuple

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.verification import StepVerdict

__all__ = ["Ruling"]


class Ruling(NamedTuple):
    """What was decided about a step.

    Args:
        verdict: the verdict on its table of signals.
        banned: the workers that the step bans.
        excluded: the workers whose signals do not match. If there are any the step is undone: their signals are in its gradients.
        redo: whether to repeat the step without the excluded workers, which takes a complete lane of the others.
        plan: the plan of the step that was judged.
        lost: workers whose gradients are lost, with those of earlier batches of the same step.
    """

    verdict: StepVerdict
    banned: list[Worker]
    excluded: list[Worker]
    redo: bool
    plan: StepPlan
    lost: frozenset[Worker] = frozenset()
