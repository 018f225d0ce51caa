"""What comes of a step: what one process has to say of it, and what all know once everybody has spoken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_sentinel.mesh import Boundary
from lightning_sentinel.pipeline.logs import LogRecorder, LogSchema
from lightning_sentinel.verification import SignalTable

__all__ = ["StepOutcome", "StepResult", "is_skipped", "mean_loss"]


@dataclass(frozen=True)
class StepResult:
    """What one process has to say of a step.

    Args:
        losses: ``(lanes, 3)`` of the lanes whose last stage is here: the sum of a lane's weighted losses, of their weights, and of
            the weights of micro-batches for which ``training_step`` returned ``None``; zeros where none is.
        recorder: what the step has logged; empty where no last stage is.
        rows: ``(senders, receipts, len(COLUMNS))`` of each boundary that is verified here; ``None`` if nothing is verified.
        broken: 0-dim bool, whether the weight gradients that this process adds up are of no use; ``None`` where nobody looks, which
            is so on all ranks or on none.
        stops: whether the step asks for the end of training; asked of workers of the last stage.
        signals: how many operating-system signals of each kind this process has had; as many kinds on all ranks.
        refused: how often each worker of the stage has added what is not finite to what the stage learns; empty where nobody looks.
    """

    losses: Tensor
    recorder: LogRecorder
    rows: Mapping[Boundary, Tensor] | None = None
    broken: Tensor | None = None
    stops: bool = False
    signals: Sequence[int] = ()
    refused: Sequence[int] = ()


@dataclass(frozen=True)
class StepOutcome:
    """What all ranks know of a step.

    Args:
        loss: mean over the samples that count, or ``None`` if none does.
        table: all signals, or ``None`` if nothing is verified.
        broken: ``(stages, lanes, slots)`` bool, whose weight gradients are of no use at a stage, because they are not finite;
            ``None`` where nobody looks.
        schema: names of what the step logs.
        logged: value and weight of each logged name.
        stops: whether a step asks for the end of training.
        skipped: whether ``training_step`` returned ``None`` for all micro-batches that count.
        signals: the largest number of operating-system signals of each kind that any process has had; empty if nobody asks.
        refused: ``(stages, replicas, replicas)``, how often each worker has seen each of its stage add what is not finite to what
            the stage learns; ``None`` where nobody looks.
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


def mean_loss(losses: Tensor, believed: bool) -> float | None:
    """The loss of a step, or ``None`` if nothing counts.

    Args:
        losses: as in :class:`StepResult`, of all lanes that have worked.
        believed: whatever they are. Else a lane whose loss is not finite is passed over, as its gradients are, unless all are such.

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
    """Whether ``training_step`` returned ``None`` for all that counts, of the losses that :func:`mean_loss` takes.

    Example:
        >>> import torch
        >>> is_skipped(torch.tensor([[0.0, 0.0, 1.0]])), is_skipped(torch.tensor([[0.3, 0.5, 0.5]]))
        (True, False)
    """
    return bool((losses[:, 2] > 0).any() and not (losses[:, 1] > 0).any())
