"""What follows from weight gradients that are not finite: they are left out, and whose they are is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.verdicts import Detection, StepVerdict
from lightning_sentinel.wiring import Wiring

__all__ = ["WEIGHT_GRADIENT", "without_broken"]

WEIGHT_GRADIENT = "weight_gradient"
"""What stands in a detection where for a signal there is the feature that was furthest out."""


def without_broken(
    verdict: StepVerdict, broken: Tensor, finite: Tensor, mesh: Mesh, wiring: Wiring, step: int
) -> tuple[StepVerdict, Counter[Worker]]:
    """Leave out of a stage what its workers cannot add up.

    Where all workers of a stage have such gradients the training has diverged, and nobody is blamed. Nobody is banned for them
    either: an honest worker that was sent huge values, in a warm-up that flags nothing, has them as well.

    Args:
        verdict: of the step's signals.
        broken: ``(stages, lanes, micro_batches)`` bool.
        finite: ``(lanes, micro_batches)`` bool, where all signals are. Whoever was sent something else is not to be blamed.
        mesh: the workers.
        wiring: who served which lane.
        step: number of the training batch.

    Returns:
        the verdict with a detection for each worker that is blamed, and how many of its micro-batches were left out.
    """
    if not broken.any():
        return verdict, Counter()
    live = torch.tensor(wiring.live)
    broken = broken & live[:, None]
    lanes = broken.any(dim=2)
    blamed = lanes & ~(lanes | ~live).all(dim=1, keepdim=True) & finite.all(dim=1)
    counts, detections = Counter[Worker](), []
    for stage, lane in blamed.nonzero().tolist():
        worker, slots = wiring.worker(stage, lane), broken[stage, lane].nonzero().flatten().tolist()
        counts[worker] += len(slots)
        detections.append(Detection(step, slots[0], worker, Direction.GRADIENT, MAX_SCORE, WEIGHT_GRADIENT))
    left = replace(verdict, clean=verdict.clean & ~broken, detections=(*verdict.detections, *detections))
    return left, counts
