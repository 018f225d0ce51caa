"""A step's results: those of one process, their combination over all ranks, and what all ranks decide from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from lightning_sentinel.mesh import Boundary, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.evidence import Evidence
from lightning_sentinel.verification import SignalTable, StepVerdict

__all__ = ["Ruling", "StepOutcome", "StepResult", "is_skipped", "mean_loss"]


@dataclass(frozen=True)
class StepResult:
    """One process's results of a step.

    Args:
        losses: ``(lanes, 3)``, for the lanes whose last stage is in this process: the sums of a lane's weighted losses, of their
            weights, and of the weights of micro-batches for which ``training_step`` returned ``None``; zeros elsewhere.
        recorder: the step's logged values; empty in a process without a last stage.
        rows: ``(senders, receipts, len(COLUMNS))`` for each boundary that this process verifies; ``None`` if no signal is verified.
        broken: 0-dim bool, whether the weight gradients that this process sums are unusable; ``None`` if not checked, which is the
            same on all ranks.
        stops: whether the step asks for the end of training; counts for workers of the last stage.
        signals: how many operating-system signals of each kind this process has received; the same kinds on all ranks.
        refused: how often each worker of the stage contributed non-finite values to a reference update; empty if not checked.
        commitments: this worker's part of :class:`StepCommitments`, encoded; empty in a step that is not audited.
        contribution: ``(SKETCHED,)``, the sketch of what this worker adds to the weight gradients of its stage; of all in one
            process ``(stages, replicas, SKETCHED)``; ``None`` if not checked, which is the same on all ranks.
    """

    losses: Tensor
    recorder: LogRecorder
    rows: Mapping[Boundary, Tensor] | None = None
    broken: Tensor | None = None
    stops: bool = False
    signals: Sequence[int] = ()
    refused: Sequence[int] = ()
    commitments: bytes = b""
    contribution: Tensor | None = None


@dataclass(frozen=True)
class StepOutcome:
    """The results of a step over all ranks, the same on each.

    Args:
        loss: mean over the samples that count, or ``None`` if none does.
        table: the table of all signals, or ``None`` if no signal is verified.
        broken: ``(stages, lanes, slots)`` bool, whether weight gradients are unusable at a stage, because they are not finite;
            ``None`` if not checked.
        schema: the names that the step logs.
        logged: value and weight of each logged name.
        stops: whether any lane's step asks for the end of training.
        skipped: whether ``training_step`` returned ``None`` for all micro-batches that count.
        signals: of each kind of operating-system signal, the largest number that any process has received; empty if not asked for.
        refused: ``(stages, replicas, replicas)``, how often each worker has seen each worker of its stage contribute non-finite
            values to a reference update; ``None`` if not checked.
        commitments: what workers say about the messages that they sent and received; ``None`` in a step that is not audited.
        forgers: workers whose row of the step before bore no valid signature.
        contributions: ``(stages, replicas, SKETCHED)``, the sketch of what each worker adds to the weight gradients of its stage;
            ``None`` if not checked.
    """

    loss: float | None
    table: SignalTable | None
    broken: Tensor | None
    schema: LogSchema
    logged: dict[str, tuple[float, float]]
    stops: bool = False
    skipped: bool = False
    signals: tuple[int, ...] = ()
    refused: Tensor | None = None
    commitments: StepCommitments | None = None
    forgers: frozenset[Worker] = frozenset()
    contributions: Tensor | None = None


class Ruling(NamedTuple):
    """What was decided about a step.

    Args:
        verdict: the verdict on its table of signals.
        banned: the workers that the step bans.
        excluded: the workers whose signals do not match. If there are any the step is undone: their signals are in its gradients.
        redo: whether to repeat the step without the excluded workers, which takes a complete lane of the others.
        plan: the plan of the step that was judged.
        lost: workers whose gradients are lost, with those of earlier batches of the same step.
        evidence: of bans that audits led to.
        contradictions: workers that say different things about a message between them.
        forgers: workers whose row of the step before bore no valid signature, or that do not open their seal of this step.
    """

    verdict: StepVerdict
    banned: list[Worker]
    excluded: list[Worker]
    redo: bool
    plan: StepPlan
    lost: frozenset[Worker] = frozenset()
    evidence: Mapping[Worker, Evidence] = MappingProxyType({})
    contradictions: Sequence[tuple[Worker, Worker]] = ()
    forgers: frozenset[Worker] = frozenset()


def mean_loss(losses: Tensor, believed: bool) -> float | None:
    """The loss of a step, or ``None`` if no sample counts.

    Args:
        losses: as in :class:`StepResult`, of all lanes that have worked.
        believed: whether non-finite losses count. Else lanes that have one are left out, as their gradients are, unless all do.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[3.0, 1.0, 0.0], [torch.nan, 1.0, 0.0]])
        >>> mean_loss(losses, believed=False), mean_loss(losses, believed=True)
        (3.0, nan)
    """
    finite = losses.isfinite().all(dim=1)
    if not believed and finite.any():
        losses = losses[finite]
    total, weight, _ = losses.sum(dim=0).tolist()
    return total / weight if weight > 0 else None


def is_skipped(losses: Tensor) -> bool:
    """Whether ``training_step`` returned ``None`` for all micro-batches that count, from the losses that :func:`mean_loss` takes.

    Example:
        >>> import torch
        >>> is_skipped(torch.tensor([[0.0, 0.0, 1.0]])), is_skipped(torch.tensor([[0.3, 0.5, 0.5]]))
        (True, False)
    """
    return bool((losses[:, 2] > 0).any() and not (losses[:, 1] > 0).any())
