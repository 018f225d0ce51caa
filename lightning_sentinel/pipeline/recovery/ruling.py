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
        verdict: what its table means.
        banned: the workers that it bans.
        excluded: the workers whose signals do not match, without whom the step is to be undone: its gradients hold what they sent.
        redo: whether the step is to be done again without them; it cannot be if nobody is left who could.
        plan: of the step that was judged.
        lost: workers whose gradients are gone, with those of earlier batches of the same step.
    """

    verdict: StepVerdict
    banned: list[Worker]
    excluded: list[Worker]
    redo: bool
    plan: StepPlan
    lost: frozenset[Worker] = frozenset()
