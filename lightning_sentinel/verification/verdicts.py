"""From the scores of a step to verdicts: which workers are blamed, and which signals are left out or learned from.

Pure functions of data that all ranks hold, so that all ranks decide the same without communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification.audit import Drawn, causal_order
from lightning_sentinel.verification.calibration import Assessment
from lightning_sentinel.verification.drift import ALARM, ALARM_WITHOUT_AUDITS, DOUBT
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.jury import Auditable, Decision, Findings
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.table import SignalTable
from lightning_sentinel.wiring import Wiring

__all__ = ["MUCH_FURTHER", "Audit", "Detection", "StepVerdict", "behind", "judge", "judge_with_audits"]

Audit = Callable[[Auditable], Findings]
"""Has signals, rows and notes recomputed."""

_ALONE = 1.5
"""The score up to which a sender without peers is cleared."""

_WITHHELD = {Outcome.ACTIVATION_WITHHELD: Direction.ACTIVATION, Outcome.GRADIENT_WITHHELD: Direction.GRADIENT}

MUCH_FURTHER = 2.0
"""The score that hardly any honest signal has."""
_NEARLY = 0.75
"""Above this score a signal is not learned from, where most of the compared workers may be malicious."""


@dataclass(frozen=True)
class Detection:
    """One signal that was found out of line.

    Args:
        step: training batch, counted from 0 over the whole run.
        micro_batch: index within the batch.
        worker: the sender.
        direction: activation or gradient.
        score: how far out; 1 is the fence.
        feature: the feature that is furthest out, or ``"non_finite"``; ``"weight_gradient"`` for a non-finite contribution to the
            stage's weight gradients, and ``"lesson"`` for one to its references; ``"row"`` and ``"note"`` for a false report of the
            worker on a signal.
        audited: whether the signal was recomputed by another worker.
        confirmed: the outcome of the audit: ``False`` exonerates the sender; ``None`` without an audit, or where it is disputed.
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
    """All decisions about a step's signals and workers.

    Args:
        detections: the flags that stand, and those that an audit dropped.
        flagged: how many signals of each worker were flagged and not cleared.
        suspects: workers of which at least half the verified signals of one direction were flagged.
        unmistakable: suspects that sent non-finite values, which no received signal makes an honest worker send.
        verified: workers with at least one verified signal.
        guilty: workers that most of their stage found to have lied.
        disputed: workers accused of a lie by another, without a majority that decides.
        outvoted: workers that voted on others' signals the opposite of the majority.
        audits: how many signals were recomputed, without those behind one that does not match.
        honest: ``(boundaries, lanes, micro_batches)`` bool, signals to learn from.
        heard: ``(boundaries, lanes, micro_batches)`` bool, signals to remember as the votes of their senders, even if it is open
            whether they are honest.
        explained: ``(boundaries, lanes, micro_batches)`` bool, signals that are no evidence about their sender: what it received
            may be the cause.
        clean: ``(stages, lanes, micro_batches)`` bool, whether the gradient of a micro-batch counts at a stage.
        table: the step's signals with their final scores.
        reports: what was decided of rows and notes that one worker did not confirm.
    """

    detections: tuple[Detection, ...]
    flagged: Counter[Worker]
    suspects: frozenset[Worker]
    unmistakable: frozenset[Worker]
    verified: frozenset[Worker]
    guilty: frozenset[Worker]
    disputed: frozenset[Worker]
    outvoted: frozenset[Worker]
    audits: int
    honest: Tensor
    heard: Tensor
    explained: Tensor
    clean: Tensor
    table: SignalTable
    reports: tuple[Decision, ...] = ()


def judge(
    table: SignalTable, assessment: Assessment, heights: Tensor, mesh: Mesh, wiring: Wiring, step: int, exclude: bool
) -> StepVerdict:
    """Verdicts of one step without audits.

    Each micro-batch is followed on its way, forward and backward. The first signal that is out of line explains all deviations
    behind it. And a sender with a high cumulative sum explains slight deviations behind it: a lie that is too small to be seen by
    itself is amplified by the stages that it goes through, and a worker that passes it on is not to blame.

    Args:
        table: all signals of the step.
        assessment: their scores.
        heights: ``(boundaries, lanes)``, cumulative sums of the senders.
        mesh: the workers.
        wiring: which worker served which lane.
        step: number of the training batch.
        exclude: whether flagged micro-batches were kept out of the weights at receipt.
    """
    live = torch.tensor(wiring.live)
    valid = assessment.valid
    score = assessment.score
    # Where honest workers are out of line themselves every now and then, no worker is blamed for as much.
    out = valid & (score > assessment.typical.clamp(min=1)[:, None, None])
    certain = (assessment.by_peers & assessment.certain)[:, None, None]
    blamed = out & (certain | ~_cleared(score, valid))
    # Remembered votes do not follow the training from step to step.
    remembered = (assessment.by_peers & ~assessment.quorum)[:, None, None]
    blamed &= ~remembered | (score > MUCH_FURTHER)
    open_question = assessment.by_peers[:, None, None] & ~certain & valid & (score > _NEARLY) & ~blamed

    doubtful = valid & (heights > DOUBT)[..., None]
    doubted = behind(doubtful | open_question, mesh)
    slightly = blamed & (score <= MUCH_FURTHER) | valid & ~out & (heights > ALARM_WITHOUT_AUDITS)[..., None]
    standing, explained = _first_along_the_way(blamed & ~slightly | slightly & ~doubted, mesh)
    finite = assessment.worst >= 0
    heard = valid & ~standing & ~explained & ~doubted & finite
    explained |= (doubted | open_question) & ~standing
    scored = table.scored(assessment.score, assessment.worst)
    suspects = _suspects(standing, valid & ~explained, mesh, wiring)
    return StepVerdict(
        detections=_detections(scored, standing, mesh, wiring, step),
        flagged=_count(standing, mesh, wiring),
        suspects=suspects,
        unmistakable=suspects & _count(standing & ~finite, mesh, wiring).keys(),
        verified=frozenset(_count(valid & ~explained, mesh, wiring)),
        guilty=frozenset(),
        disputed=frozenset(),
        outvoted=frozenset(),
        audits=0,
        # A training that overflows everywhere is no worker's fault, but there is nothing to learn from it.
        honest=valid & ~standing & ~explained & ~doubtful & finite,
        heard=heard,
        explained=explained,
        clean=_clean(table.flagged, live, mesh) if exclude else torch.ones(mesh.stages, *valid.shape[1:], dtype=torch.bool),
        table=scored,
    )


def judge_with_audits(
    table: SignalTable,
    assessment: Assessment,
    heights: Tensor,
    drawn: Drawn,
    one_each: Tensor,
    audit: Audit,
    mesh: Mesh,
    wiring: Wiring,
    step: int,
) -> StepVerdict:
    """Verdicts of one step with audits of flagged and drawn signals.

    Each micro-batch is followed on its way, forward and backward. The first signal that does not match its recomputation explains
    all deviations behind it, whatever audits say of those. And odd data is odd at every stage: where an audit drops a flag, flags
    behind it that are not much further out are dropped with it. All signals to recompute are chosen beforehand, so that they are
    recomputed at once.

    Args:
        drawn: what workers have drawn: signals and rows audited whatever their scores.
        one_each: ``(boundaries, lanes, micro_batches)`` bool, the signal of each sender that is audited if its cumulative sum is
            high.
        audit: has signals recomputed; called once.

    The other arguments are those of :func:`judge`.
    """
    valid = assessment.valid
    flagged = assessment.valid & (assessment.score > 1)
    # One signal of a sender tells whether it drifts away because it lies; no worker knows beforehand which.
    suspected = one_each & (heights > ALARM)[..., None]
    any_drawn = drawn.signals.any(dim=0)
    known = valid & (flagged | suspected)
    only_flagged = flagged & ~any_drawn & ~suspected
    audited = _audited(known | (valid & any_drawn), flagged, only_flagged, assessment.score, mesh)
    # Rows are drawn by themselves, those of tainted signals as well: who says that a signal was tainted keeps it from being judged.
    findings = audit(Auditable(audited & known, drawn._replace(signals=drawn.signals & audited)))
    confirmed, disputed, explained = _causes(findings, audited, mesh)
    outvoted = [workers for place, workers in findings.outvoted.items() if audited[place]]
    false = confirmed | disputed
    honest = valid & ~false & ~explained & (assessment.worst >= 0)
    scored = table.scored(assessment.score, assessment.worst)
    shown = ((flagged | suspected) & audited & ~explained) | false
    detections = _detections(scored, shown, mesh, wiring, step)
    lies = [None if open_question else lied for lied, open_question in zip(confirmed[shown].tolist(), disputed[shown].tolist())]
    return StepVerdict(
        detections=tuple(replace(one, audited=True, confirmed=lied) for one, lied in zip(detections, lies)),
        flagged=_count(false, mesh, wiring),
        suspects=frozenset(),
        unmistakable=frozenset(),
        verified=frozenset(_count(valid & ~explained, mesh, wiring)),
        guilty=frozenset(_count(confirmed, mesh, wiring)),
        disputed=frozenset(_count(disputed, mesh, wiring)),
        outvoted=frozenset().union(*outvoted),
        audits=int(audited.sum()),
        honest=honest,
        heard=honest,
        explained=explained,
        clean=torch.tensor(wiring.live)[None, :, None].expand(mesh.stages, *valid.shape[1:]),
        table=scored,
        reports=findings.reports,
    )


def _causes(findings: Findings, audited: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor, Tensor]:
    """Follow each micro-batch on its way, to the first signal that does not match its recomputation.

    Args:
        findings: of the audits.
        audited: ``(boundaries, lanes, micro_batches)`` bool, signals that were audited; those behind the first one that does not
            match are dropped in place.
        mesh: all workers.

    Returns:
        ``(boundaries, lanes, micro_batches)`` bool each: whether a signal is a lie, whether that is disputed, and whether it is no
        evidence about its sender, because of what came before it.
    """
    confirmed = torch.zeros_like(audited)
    disputed = torch.zeros_like(audited)
    explained = torch.zeros_like(audited)
    if not bool((audited & (findings.outcome != Outcome.MATCHES)).any()):
        return confirmed, disputed, explained
    found = torch.zeros(audited.shape[1:], dtype=torch.bool)
    for index in causal_order(mesh):
        explained[index] = found
        audited[index] &= ~found
        outcome = torch.where(audited[index], findings.outcome[index], Outcome.MATCHES)
        confirmed[index] |= outcome == Outcome.LIED
        disputed[index] |= outcome == Outcome.DISPUTED
        for said, direction in _WITHHELD.items():
            if bool((outcome == said).any()):
                confirmed[_sent_to(index, direction, mesh)] |= outcome == said
                # Whether the signal computed from the withheld one is right is unknown.
                explained[index] |= outcome == said
        withheld = outcome == Outcome.SIGNAL_WITHHELD
        if bool(withheld.any()):
            confirmed[_sent_by_receiver(index, mesh)] |= withheld
            explained[index] |= withheld
        found = found | (outcome != Outcome.MATCHES)
    return confirmed, disputed, explained


def _audited(wanted: Tensor, flagged: Tensor, only_flagged: Tensor, score: Tensor, mesh: Mesh) -> Tensor:
    """The signals to recompute, before any lie is known: flags are followed to where they come from.

    Args:
        wanted: ``(boundaries, lanes, micro_batches)`` bool, signals with a reason to audit.
        flagged: the same, signals out of line.
        only_flagged: the same, signals with no other reason than that.
        score: of all signals.
    """
    audited = torch.zeros_like(wanted)
    oddity = torch.zeros(wanted.shape[1:], dtype=score.dtype)
    for index in causal_order(mesh):
        follows = only_flagged[index] & (score[index] <= MUCH_FURTHER * oddity)
        audited[index] = wanted[index] & ~follows
        oddity = torch.maximum(oddity, torch.where(audited[index] & flagged[index], score[index], 0.0))
    return audited


def _sent_to(index: int, direction: Direction, mesh: Mesh) -> int:
    """The boundary across which the sender of boundary ``index`` received its activation or gradient."""
    stage = mesh.boundaries[index].sender
    return mesh.boundaries.index(Boundary(stage - (direction is Direction.ACTIVATION), direction))


def _sent_by_receiver(index: int, mesh: Mesh) -> int:
    """A boundary across which the receiver of boundary ``index`` sends."""
    boundary = mesh.boundaries[index]
    back = next(direction for direction in Direction if direction is not boundary.direction)
    return mesh.boundaries.index(mesh.after(boundary) or Boundary(boundary.index, back))


def behind(signals: Tensor, mesh: Mesh) -> Tensor:
    """All signals behind any of the given ones on the way of a micro-batch; both ``(boundaries, lanes, ...)`` bool.

    Example:
        >>> behind(torch.tensor([[True], [False], [False], [False]]), Mesh(stages=3, replicas=1)).flatten()
        tensor([False,  True,  True,  True])
    """
    order = torch.tensor(causal_order(mesh), dtype=torch.long)
    along = signals[order].long()
    result = torch.zeros_like(signals)
    result[order] = (along.cumsum(dim=0) - along) > 0
    return result


def _first_along_the_way(out: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The first out-of-line signal of each micro-batch, and all signals behind it, which it explains."""
    explained = behind(out, mesh)
    return out & ~explained, explained


def _cleared(score: Tensor, valid: Tensor) -> Tensor:
    """Signals out of line because the training has changed, not because of a worker; for boundaries without enough peers.

    Fewer than half of a stage's workers are malicious, so the *median* sender of a boundary is honest. When the training changes (a
    new learning rate, other data, or just progress since the window was filled) the median moves out as well, and signals no more
    than twice as far out are cleared.

    Senders that could not be verified, because an earlier stage tainted them or they are banned, count as honest: else malicious
    senders could outnumber the rest. Where too few are left for that, the sender that is least far out counts as honest. A single
    sender has no peer: then signals just outside its fences are cleared, or the fences could never follow the training.

    Values that are not finite have the highest score, so they are cleared only where the median sender sends such values too.

    Args:
        score: ``(boundaries, lanes, micro_batches)``.
        valid: ``(boundaries, lanes, micro_batches)`` bool.
    """
    # By sender first: one that was verified more often than others must not outvote them. The lower median: half of a sender's
    # signals being odd is not to clear others.
    senders = torch.where(valid, score, torch.nan).nanmedian(dim=2).values
    verified = (~senders.isnan()).sum(dim=1)
    rank = (verified - score.shape[1] // 2).clamp(min=1)
    ordered = senders.nan_to_num(nan=torch.inf).sort(dim=1).values
    reference = ordered.gather(1, (rank - 1)[:, None]).squeeze(1)
    limit = torch.where(verified <= 1, _ALONE, 2 * reference)[:, None, None]
    return score <= limit


def _clean(flagged: Tensor, live: Tensor, mesh: Mesh) -> Tensor:
    """A flagged activation takes its micro-batch out of every stage; a flagged gradient out of the stages it reaches."""
    cuts = mesh.stages - 1
    activation = flagged[:cuts]
    gradient = flagged[cuts:]
    whole = activation.any(dim=0)
    clean = torch.empty(mesh.stages, *whole.shape, dtype=torch.bool)
    for stage in range(mesh.stages):
        clean[stage] = live[:, None] & ~whole & ~gradient[stage:].any(dim=0)
    return clean


def _count(signals: Tensor, mesh: Mesh, wiring: Wiring) -> Counter[Worker]:
    counts: Counter[Worker] = Counter()
    totals = signals.sum(dim=2)
    for index, lane in totals.nonzero().tolist():
        counts[wiring.worker(mesh.boundaries[index].sender, lane)] += int(totals[index, lane])
    return counts


def _suspects(standing: Tensor, verified: Tensor, mesh: Mesh, wiring: Wiring) -> frozenset[Worker]:
    """A single flag is often an odd micro-batch; a worker that tampers is out of line most of the time."""
    out_of_line = (standing.sum(dim=2) * 2 >= verified.sum(dim=2)) & standing.any(dim=2)
    return frozenset(wiring.worker(mesh.boundaries[index].sender, lane) for index, lane in out_of_line.nonzero().tolist())


def _detections(table: SignalTable, standing: Tensor, mesh: Mesh, wiring: Wiring, step: int) -> tuple[Detection, ...]:
    boundaries = mesh.boundaries
    scores = table.column("score")
    worst = table.column("worst")
    detections = []
    for index, lane, micro_batch in standing.nonzero().tolist():
        boundary = boundaries[index]
        feature = int(worst[index, lane, micro_batch])
        detections.append(
            Detection(
                step=step,
                micro_batch=micro_batch,
                worker=wiring.worker(boundary.sender, lane),
                direction=boundary.direction,
                score=float(scores[index, lane, micro_batch]),
                feature=FEATURES[feature] if feature >= 0 else "non_finite",
            )
        )
    return tuple(detections)
