"""From the table of a step to verdicts: who is blamed, what was left out, what may be learned from.

A pure function of data that all ranks hold, so that all of them decide the same without asking each other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.table import SignalTable

__all__ = ["Detection", "StepVerdict", "judge"]


_ALONE = 1.5
"""The score up to which a sender without peers is cleared."""


@dataclass(frozen=True)
class Detection:
    """One signal that was found out of line.

    Args:
        step: training batch, counted from 0 over the whole run.
        micro_batch: index within the batch.
        worker: who sent it.
        direction: what was sent.
        score: how far out; 1 is the fence.
        feature: the feature that is furthest out, or ``"non_finite"``.
        audited: whether the signal was recomputed by another worker.
        confirmed: the outcome of the audit; ``None`` without one.
    """

    step: int
    micro_batch: int
    worker: Worker
    direction: Direction
    score: float
    feature: str
    audited: bool = False
    confirmed: bool | None = None


@dataclass(frozen=True)
class StepVerdict:
    """What a step's table means.

    Args:
        detections: the flags that stand.
        flagged: how many signals of each worker were flagged.
        suspects: workers of which at least half the verified signals of one direction were flagged.
        verified: workers of which at least one signal was verified.
        cleared: ``(boundaries, replicas, micro_batches)`` bool, flags that were dropped, because the training itself had changed.
        honest: ``(boundaries, replicas, micro_batches)`` bool, signals to learn from.
        clean: ``(stages, replicas, micro_batches)`` bool, whether the gradient of a micro-batch counts at a stage.
    """

    detections: tuple[Detection, ...]
    flagged: Counter[Worker]
    suspects: frozenset[Worker]
    verified: frozenset[Worker]
    cleared: Tensor
    honest: Tensor
    clean: Tensor


def judge(table: SignalTable, mesh: Mesh, live: Tensor, step: int, exclude: bool) -> StepVerdict:
    """Verdicts of one step.

    Args:
        table: all signals of the step.
        mesh: the workers.
        live: ``(replicas,)`` bool, pipelines without a banned worker.
        step: number of the training batch.
        exclude: whether flagged micro-batches were kept out of the weights at receipt.
    """
    flagged, tainted = table.flagged, table.tainted
    cleared = _cleared(table, live)
    standing = flagged & ~cleared
    return StepVerdict(
        detections=_detections(table, standing, mesh, step),
        flagged=_count(standing, mesh),
        suspects=_suspects(standing, ~tainted, mesh),
        verified=frozenset(_count(~tainted, mesh)),
        cleared=cleared,
        # A training that overflows everywhere is nobody's fault, but there is nothing to learn from it.
        honest=~tainted & ~standing & (table.column("worst") >= 0),
        clean=_clean(flagged, live, mesh) if exclude else torch.ones(mesh.stages, *flagged.shape[1:], dtype=torch.bool),
    )


def _cleared(table: SignalTable, live: Tensor) -> Tensor:
    """Flags that a change of the training explains, not a worker.

    Fewer than half of a stage's workers are malicious, so the *median* sender of a boundary is honest. When the training changes (a
    new learning rate, other data, or just progress since the window was filled) the median moves out as well, and signals no more
    than twice as far out are cleared.

    Senders that could not be verified, because an earlier stage tainted them or they are banned, count as honest: else malicious
    ones could get a majority of those that are left. Where too few are left, and with a single replica, there is nobody to be
    compared with: then what is just outside its fences is cleared, or the fences could never follow a training that moves.

    Values that are not finite have the highest score, so they are cleared only where the median sender sends such values too.
    """
    replicas = len(live)
    scores = torch.where(table.tainted | ~live[:, None], torch.nan, table.column("score"))
    # By sender first: one that was verified more often than others must not outvote them.
    senders = scores.nanmedian(dim=2).values
    rank = (~senders.isnan()).sum(dim=1) - replicas // 2
    ordered = senders.nan_to_num(nan=torch.inf).sort(dim=1).values
    reference = ordered.gather(1, (rank - 1).clamp(min=0)[:, None]).squeeze(1)
    comparable = (rank >= 1) & (replicas > 1)
    limit = torch.where(comparable, 2 * reference, _ALONE)[:, None, None]
    return table.flagged & (scores <= limit)


def _clean(flagged: Tensor, live: Tensor, mesh: Mesh) -> Tensor:
    """A flagged activation takes its micro-batch out of every stage; a flagged gradient out of the stages it reaches."""
    cuts = mesh.stages - 1
    activation, gradient = flagged[:cuts], flagged[cuts:]
    whole = activation.any(dim=0)
    clean = torch.empty(mesh.stages, *whole.shape, dtype=torch.bool)
    for stage in range(mesh.stages):
        clean[stage] = live[:, None] & ~whole & ~gradient[stage:].any(dim=0)
    return clean


def _count(signals: Tensor, mesh: Mesh) -> Counter[Worker]:
    counts: Counter[Worker] = Counter()
    for boundary, replicas in zip(mesh.boundaries, signals.sum(dim=2).tolist()):
        counts.update({Worker(boundary.sender, r): count for r, count in enumerate(replicas) if count})
    return counts


def _suspects(standing: Tensor, verified: Tensor, mesh: Mesh) -> frozenset[Worker]:
    """A single flag is often an odd micro-batch; a worker that tampers is out of line most of the time."""
    out_of_line = (standing.sum(dim=2) * 2 >= verified.sum(dim=2)) & standing.any(dim=2)
    return frozenset(Worker(mesh.boundaries[index].sender, replica) for index, replica in out_of_line.nonzero().tolist())


def _detections(table: SignalTable, standing: Tensor, mesh: Mesh, step: int) -> tuple[Detection, ...]:
    boundaries, scores, worst = mesh.boundaries, table.column("score"), table.column("worst")
    detections = []
    for index, replica, micro_batch in standing.nonzero().tolist():
        boundary, feature = boundaries[index], int(worst[index, replica, micro_batch])
        detections.append(
            Detection(
                step=step,
                micro_batch=micro_batch,
                worker=Worker(boundary.sender, replica),
                direction=boundary.direction,
                score=float(scores[index, replica, micro_batch]),
                feature=FEATURES[feature] if feature >= 0 else "non_finite",
            )
        )
    return tuple(detections)
