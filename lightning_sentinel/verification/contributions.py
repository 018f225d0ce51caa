"""Non-finite contributions to sums over a stage: they are left out, and their worker is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.verdicts import Detection, StepVerdict
from lightning_sentinel.wiring import Wiring

__all__ = ["LESSON", "WEIGHT_GRADIENT", "Refusals", "with_refusals", "without_broken"]

LESSON = "lesson"
"""The ``feature`` of a detection for a non-finite contribution to a stage's references."""

WEIGHT_GRADIENT = "weight_gradient"
"""The ``feature`` of a detection for a non-finite weight gradient."""


def without_broken(
    verdict: StepVerdict, broken: Tensor, finite: Tensor, mesh: Mesh, wiring: Wiring, step: int
) -> tuple[StepVerdict, Counter[Worker]]:
    """Leave non-finite weight gradients out of the sum over their stage.

    Where all workers of a stage have such gradients the training has diverged, and no worker is blamed. Nor is any banned for them:
    an honest worker that received huge values, in a warm-up that flags nothing, has them as well.

    Args:
        verdict: of the step's signals.
        broken: ``(stages, lanes, micro_batches)`` bool, non-finite gradients.
        finite: ``(lanes, micro_batches)`` bool, where all signals are finite. A worker that received a non-finite one is not to
            blame.
        mesh: the workers.
        wiring: which worker served which lane.
        step: number of the training batch.

    Returns:
        the verdict with a detection for each blamed worker, and how many of its micro-batches were left out.
    """
    if not broken.any():
        return verdict, Counter()
    live = torch.tensor(wiring.live)
    broken = broken & live[:, None]
    lanes = broken.any(dim=2)
    blamed = lanes & ~(lanes | ~live).all(dim=1, keepdim=True) & finite.all(dim=1)
    counts = Counter[Worker]()
    detections = []
    for stage, lane in blamed.nonzero().tolist():
        worker = wiring.worker(stage, lane)
        slots = broken[stage, lane].nonzero().flatten().tolist()
        counts[worker] += len(slots)
        detections.append(Detection(step, slots[0], worker, Direction.GRADIENT, MAX_SCORE, WEIGHT_GRADIENT))
    left = replace(verdict, clean=verdict.clean & ~broken, detections=(*verdict.detections, *detections))
    return left, counts


class Refusals:
    """Non-finite contributions to references, counted alike on all ranks; each stage observes its own workers.

    Args:
        mesh: the workers.

    Example:
        >>> refusals, said = Refusals(Mesh(1, 3)), torch.zeros(1, 3, 3)
        >>> said[0, :2, 2] = 1  # Two of three say so of the third, once,
        >>> refusals.news(said, ()), refusals.news(said, ())  # and go on saying so.
        (Counter({Worker(stage=0, replica=2): 1}), Counter())
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._known: Counter[Worker] = Counter()

    def news(self, said: Tensor, banned: Collection[Worker]) -> Counter[Worker]:
        """New contributions by worker. Where all live workers of a stage have some, its training has diverged: none is blamed.

        Args:
            said: ``(stages, replicas, replicas)``, how often each worker has seen each worker of its stage do so since the run
                began. A count needs reports by more than half of the other workers that are not banned.
            banned: workers whose reports do not count.
        """
        news: Counter[Worker] = Counter()
        for stage in range(self._mesh.stages):
            live = [replica for replica in range(self._mesh.replicas) if Worker(stage, replica) not in banned]
            of_stage: Counter[Worker] = Counter()
            for accused in live:
                counts = sorted((float(said[stage, speaker, accused]) for speaker in live if speaker != accused), reverse=True)
                worker = Worker(stage, accused)
                often = int(counts[len(counts) // 2]) if counts else 0
                if often > self._known[worker]:
                    of_stage[worker] = often - self._known[worker]
                    self._known[worker] = often
            if len(of_stage) < len(live):
                news.update(of_stage)
        return news


def with_refusals(verdict: StepVerdict, news: Counter[Worker], step: int) -> StepVerdict:
    """The verdict with a detection for each worker with a new non-finite contribution to its stage's references."""
    detections = [Detection(step, 0, worker, Direction.ACTIVATION, MAX_SCORE, LESSON) for worker in sorted(news)]
    return replace(verdict, detections=(*verdict.detections, *detections))
