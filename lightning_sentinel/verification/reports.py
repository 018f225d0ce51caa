"""What workers report besides signals: whether the row of a receiver and the note of a sender are what they must be.

Both follow from signals alone, so whoever has those recomputes them: a row is what a verifier measures, a note is a projection. Two
devices may round differently. How much is allowed for that is chosen by what it can do.

A *row*: a feature may be off by a quarter of the way from its centre to its fence, of the narrower of both fences, so that what
remains hidden or invented is at most a quarter of a score; but always by four times its resolution, which no fence tells apart
either, and never by more than a quarter: most features are logarithms, and that is a factor of 1.28. Before there are fences the
latter counts.

A *note* may be off by what signals in float32 may be off, a thousandth of its norm, because notes are computed in float32 whatever
the signal's dtype.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.audit import Outcome, relative_error, tolerance
from lightning_sentinel.verification.features import FEATURES, resolution
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.jury import Subject
from lightning_sentinel.verification.table import COLUMNS, SignalTable
from lightning_sentinel.verification.verdicts import Detection, StepVerdict

__all__ = ["NOTE", "ROW", "allowed_difference", "is_false_note", "is_false_row", "with_reports"]

ROW = "row"
"""The ``feature`` of a detection for a receiver's row that is not that of the signal."""

NOTE = "note"
"""The ``feature`` of a detection for a note that is not the projection of its maker's signal."""

_SHARE_OF_A_FENCE = 0.25
_RESOLUTIONS = 4
_MOST = 0.25


def allowed_difference(alone: Fences, among_peers: Fences, positions: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """How far a reported row may be from the recomputed one: in each feature ``(F,)``, and in the score, 0-dim.

    Args:
        alone: the boundary's fences for single signals.
        among_peers: its fences for signals that are compared across replicas.
        positions: of the signal, 0-dim.
        channels: of the signal, 0-dim.

    Example:
        >>> features, score = allowed_difference(*[Fences.open(len(FEATURES))] * 2, torch.tensor(16), torch.tensor(64))
        >>> features.unique(), score
        (tensor([0.2500]), tensor(0.2500))
    """
    ways = [way for fences in (alone, among_peers) for way in (fences.upper - fences.centre, fences.centre - fences.lower)]
    narrowest = torch.stack(ways).amin(dim=0)
    allowed = torch.maximum(_SHARE_OF_A_FENCE * narrowest, _RESOLUTIONS * resolution(positions, channels)).clamp(max=_MOST)
    # A score is the largest over features, in units of the fences at receipt.
    at_receipt = torch.minimum(*ways[:2])
    return allowed, (allowed / at_receipt).amax().clamp(min=_SHARE_OF_A_FENCE)


def is_false_row(told: Tensor, recomputed: Tensor, alone: Fences, among_peers: Fences) -> bool:
    """Whether a row is not that of the signal, both ``(len(COLUMNS),)`` on the host.

    What rounding has no part in must be equal: whether the signal was tainted, whether it is finite, and its size.

    Args:
        told: as its receiver reported it.
        recomputed: by another worker of the receiver's stage.
        alone: as in :func:`allowed_difference`.
        among_peers: the same.
    """
    one, other = (SignalTable.believed(row.view(1, 1, 1, -1)).rows.flatten() for row in (told, recomputed))
    exact = [COLUMNS.index(name) for name in ("tainted", "positions", "channels")]
    worst, score = COLUMNS.index("worst"), COLUMNS.index("score")
    broken = bool(other[worst] < 0)
    if bool(one[worst] < 0) != broken or not torch.equal(one[exact], other[exact]):
        return True
    if broken:
        return False
    features, scores = allowed_difference(alone, among_peers, *other[exact[1:]])
    off = (one - other).abs()
    return bool((off[: len(FEATURES)] > features).any() | (off[score] > scores * other[score].clamp(min=1)))


def is_false_note(told: Tensor, projected: Tensor) -> Tensor:
    """Whether a note is not the projection of its maker's signal, 0-dim bool on the device of both, of equal shapes."""
    return relative_error(told, projected) > tolerance(torch.float32)


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
