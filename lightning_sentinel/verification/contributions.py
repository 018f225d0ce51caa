"""Contributions to sums over a stage: non-finite ones are left out and reported, and audits decide on weight gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.jury import ContributionCase
from lightning_sentinel.verification.majority import Judgement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.verdicts import Detection, StepVerdict
from lightning_sentinel.wiring import Wiring

__all__ = ["LESSON", "WEIGHT_GRADIENT", "Refusals", "with_contributions", "with_refusals", "without_broken"]

LESSON = "lesson"
"""The ``feature`` of a detection for a non-finite contribution to a stage's references."""

WEIGHT_GRADIENT = "weight_gradient"
"""The ``feature`` of a detection for a contribution to weight gradients."""


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


def with_contributions(
    verdict: StepVerdict,
    audited: Sequence[ContributionCase],
    judged: Mapping[ContributionCase, Judgement],
    scores: Tensor,
    wiring: Wiring,
    step: int,
) -> StepVerdict:
    """The verdict with what audits of contributions to weight gradients have found.

    Who handed an auditor another signal than the audited worker had received answers for that, as in audits of signals.

    Args:
        verdict: of the step's signals, of which none is a lie.
        audited: the contributions that were audited.
        judged: the decisions on those that an auditor said do not match.
        scores: ``(stages, replicas)``, how far out each contribution is.
        wiring: which worker served which lane.
        step: number of the training batch.
    """
    guilty: set[Worker] = set()
    disputed: set[Worker] = set()
    outvoted: set[Worker] = set()
    detections = []
    for case in audited:
        outcome, others = judged.get(case, Judgement(Outcome.MATCHES, frozenset()))
        outvoted |= others
        worker, stage = case.audited, case.audited.stage
        direction = Direction.GRADIENT
        if outcome == Outcome.ACTIVATION_WITHHELD:
            worker, direction = wiring.worker(stage - 1, case.lane), Direction.ACTIVATION
        elif outcome == Outcome.GRADIENT_WITHHELD:
            worker = wiring.worker(stage + 1, case.lane)
        score = min(float(scores[stage, case.audited.replica]), MAX_SCORE)
        lied = outcome not in (Outcome.MATCHES, Outcome.DISPUTED)
        (guilty if lied else disputed if outcome == Outcome.DISPUTED else set()).add(worker)
        if score > 1 or outcome != Outcome.MATCHES:
            confirmed = None if outcome == Outcome.DISPUTED else lied
            detections.append(Detection(step, 0, worker, direction, score, WEIGHT_GRADIENT, audited=True, confirmed=confirmed))
    return replace(
        verdict,
        detections=(*verdict.detections, *detections),
        flagged=verdict.flagged + Counter(guilty | disputed),
        guilty=verdict.guilty | guilty,
        disputed=verdict.disputed | disputed,
        outvoted=verdict.outvoted | outvoted,
        audits=verdict.audits + len(audited),
    )
