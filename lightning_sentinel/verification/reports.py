"""What workers report besides signals: whether the row of a receiver and the note of a sender are what they must be.

Both follow from signals alone, so whoever has those recomputes them: a row is what a verifier measures, a note is a projection. Two
devices may round differently. How much is allowed for that is chosen by what it can do, and by what honest devices were seen to do.

A *note* may be off by what signals in float32 may be off, a thousandth of its norm, because notes are computed in float32 whatever
the signal's dtype. With factors rounded to TF32 they were 0.0003 off.

A *row* may be off in a feature by a quarter of the way from its centre to its fence, the narrower one of both, so that what remains
hidden or invented is at most a quarter of a score; before there are fences by 0.25, as most features are logarithms a factor of
1.28. At least it may be off by four times its resolution, which no fence tells apart either. And features of what a stage changed
may be off by the thousandth that notes may be off, over the relative change: where that is 0.01 TF32 moved them by 0.04, of 0.1
that are allowed, where it is 0.001 by 0.15, of 1.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.audit import tolerance
from lightning_sentinel.verification.features import FAMILIES, FEATURES, resolution
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.jury import Subject
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.table import COLUMNS, MAX_SCORE, SignalTable
from lightning_sentinel.verification.verdicts import Detection, StepVerdict

__all__ = ["NOTE", "NOTE_TOLERANCE", "ROW", "ROW_TOLERANCE", "allowed_difference", "row_error", "with_reports"]

ROW = "row"
"""The ``feature`` of a detection for a receiver's row that is not that of the signal."""

NOTE = "note"
"""The ``feature`` of a detection for a note that is not the projection of its maker's signal."""

ROW_TOLERANCE = 1.0
"""The largest error of a true row."""

NOTE_TOLERANCE = tolerance(torch.float32)
"""The largest error, by :func:`~lightning_sentinel.verification.audit.relative_error`, of a true note."""

_SHARE_OF_A_FENCE = 0.25
_RESOLUTIONS = 4
_WITHOUT_FENCES = 0.25
_ROUNDING = tolerance(torch.float32)
_SCORE = 0.01
"""A score follows from the features of its own row; this is far more than its rounding."""

_CHANGE = FEATURES.index("change")
_OF_CHANGES = torch.tensor([name in (*FAMILIES["input_output"], "lowest_cosine", "peak_residual") for name in FEATURES])


def allowed_difference(row: Tensor, at_receipt: Fences, among_peers: Fences) -> Tensor:
    """How far a reported row may be from the recomputed one in each feature, ``(F,)``.

    Args:
        row: ``(len(COLUMNS),)``, the recomputed one.
        at_receipt: the boundary's fences for single signals.
        among_peers: its fences for signals that are compared across replicas.

    Example:
        >>> row = torch.zeros(len(COLUMNS))
        >>> row[_CHANGE] = torch.tensor(0.002).log()  # A stage that hardly changes anything.
        >>> allowed = allowed_difference(row, *[Fences.open(len(FEATURES))] * 2)
        >>> {name: round(float(allowed[FEATURES.index(name)]), 2) for name in ("norm", "change")}
        {'norm': 0.25, 'change': 0.5}
    """
    ways = [way for fences in (at_receipt, among_peers) for way in (fences.upper - fences.centre, fences.centre - fences.lower)]
    share = (_SHARE_OF_A_FENCE * torch.stack(ways).amin(dim=0)).clamp(max=_WITHOUT_FENCES)
    positions, channels = (row[COLUMNS.index(name)] for name in ("positions", "channels"))
    rounding = torch.where(_OF_CHANGES, _ROUNDING / row[_CHANGE].exp(), 0.0)
    return torch.stack((share, _RESOLUTIONS * resolution(positions, channels), rounding)).amax(dim=0)


def row_error(told: Tensor, recomputed: Tensor, at_receipt: Fences, among_peers: Fences) -> float:
    """How far a row is from that of the signal, in allowed differences: a false row is more than 1 away. Both rows are
    ``(len(COLUMNS),)`` on the host.

    What rounding has no part in must be equal: whether the signal was tainted, whether it is finite, and its size; if not the row
    is infinitely far away. The score must be that of the features beside it.

    Args:
        told: as its receiver reported it.
        recomputed: by another worker of the receiver's stage.
        at_receipt: the fences in force when the signal was received.
        among_peers: as in :func:`allowed_difference`.
    """
    one, other = (SignalTable.believed(row.view(1, 1, 1, -1)).rows.flatten() for row in (told, recomputed))
    exact = [COLUMNS.index(name) for name in ("tainted", "positions", "channels")]
    broken = [bool(row[COLUMNS.index("worst")] < 0) for row in (one, other)]
    if broken[0] != broken[1] or not torch.equal(one[exact], other[exact]):
        return math.inf
    if broken[0]:
        return 0.0
    features, score = one[: len(FEATURES)], one[COLUMNS.index("score")]
    follows = at_receipt.scores(features).max().clamp(max=MAX_SCORE)
    off = (features - other[: len(FEATURES)]).abs() / allowed_difference(other, at_receipt, among_peers)
    return float(torch.maximum(off.max(), (score - follows).abs() / (_SCORE * follows.clamp(min=1))))


def with_reports(verdict: StepVerdict, mesh: Mesh, step: int) -> StepVerdict:
    """The verdict with what follows for those whose rows and notes were audited.

    Such a case speaks for itself, wherever on the way of its micro-batch it is: rows and notes follow from what was sent, right or
    wrong. What is measured with a false row or note is not learned from.

    Args:
        verdict: of the step's signals, with the decisions on reports.
        mesh: all workers.
        step: number of the training batch.
    """
    if not verdict.reports:
        return verdict
    score = verdict.table.column("score")
    honest = verdict.honest.clone()
    found: list[Detection] = []
    for case, judgement in verdict.reports:
        if judgement.outcome in (Outcome.LIED, Outcome.DISPUTED):
            place = mesh.boundaries.index(case.boundary), case.lane, case.slot
            honest[place] = False
            feature = ROW if case.subject is Subject.ROW else NOTE
            confirmed = True if judgement.outcome == Outcome.LIED else None
            direction = case.boundary.direction
            found.append(Detection(step, case.slot, case.audited, direction, float(score[place]), feature, True, confirmed))
    return replace(
        verdict,
        detections=(*verdict.detections, *found),
        flagged=verdict.flagged + Counter(one.worker for one in found),
        guilty=verdict.guilty.union(one.worker for one in found if one.confirmed),
        disputed=verdict.disputed.union(one.worker for one in found if not one.confirmed),
        outvoted=verdict.outvoted.union(*(judgement.outvoted for _, judgement in verdict.reports)),
        honest=honest,
        heard=verdict.heard & honest,
    )
