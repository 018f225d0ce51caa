"""Weights the losses of micro-batches, and checks that each is a mean over its samples, as their average requires."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError

__all__ = ["WeightedLoss", "refuse_sum", "weighted"]

_MEAN = "mean"
_SUM = "sum"
_OTHER = "other"
_PASSED = ("Add", "Sub", "Neg", "View", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Select")
"""Name prefixes of operations that keep the kind of a reduction. Not division, which may turn a sum into a mean."""
_TOGETHER = ("Stack", "Cat")
_REDUCTIONS = {1: _MEAN, 2: _SUM}


class WeightedLoss(NamedTuple):
    """What a micro-batch adds to the loss of its step.

    Args:
        differentiated: 0-dim, the loss that the backward pass starts from; ``None`` if the step returned none.
        counted: ``(3,)``: the weighted loss if it counts, its weight if it counts, and its weight if the step returned no loss.
    """

    differentiated: Tensor | None
    counted: Tensor


def weighted(loss: Tensor | None, counts: Tensor, weight: float, scale: float | Tensor) -> WeightedLoss:
    """Weight the loss of a micro-batch by its share of the step's samples.

    Args:
        loss: 0-dim, a mean over the samples of the micro-batch; ``None`` if ``training_step`` returned ``None``.
        counts: 0-dim bool, whether the micro-batch is not left out.
        weight: its share of a replica's samples, averaged over replicas.
        scale: factor of the gradients.

    Example:
        >>> differentiated, counted = weighted(torch.tensor(3.0), torch.tensor(True), weight=0.5, scale=2.0)
        >>> differentiated, counted
        (tensor(3.), tensor([1.5000, 0.5000, 0.0000]))
        >>> weighted(torch.tensor(torch.nan), torch.tensor(False), weight=0.5, scale=2.0).counted
        tensor([0., 0., 0.])
        >>> weighted(None, torch.tensor(True), weight=0.5, scale=2.0)
        WeightedLoss(differentiated=None, counted=tensor([0.0000, 0.0000, 0.5000]))
    """
    nothing = torch.zeros((), device=counts.device)
    if loss is None:
        return WeightedLoss(None, torch.stack((nothing, nothing, counts * weight)))
    # Not multiplied by whether it counts: zero times NaN is NaN.
    value = torch.where(counts, loss.detach().float() * weight, 0.0)
    differentiated = torch.where(counts, loss * (weight * scale), 0.0)
    return WeightedLoss(differentiated, torch.stack((value, counts * weight, nothing)))


def refuse_sum(loss: Tensor, samples: int, step: str) -> None:
    """Inspect the autograd graph of a loss; this computes nothing.

    Args:
        loss: of a micro-batch, with its graph.
        samples: number of samples in the micro-batch.
        step: name of the step that returned the loss.

    Raises:
        PipelineModelError: if the loss is a sum over samples. Its mean over ``n`` micro-batches would be ``n`` times too small.
    """
    kinds = set(_reductions(loss.grad_fn, samples))
    if _SUM not in kinds:
        return
    told = (
        f"{step} returned a loss that is a sum over its samples. Each micro-batch has a loss of its own, and gradients are those of"
        " their mean, so they would not be those of the whole batch. Return a mean: reduction='mean', or divide by the number of"
        " samples (and multiply the learning rate by it). Or use SentinelStrategy(micro_batches=1)."
    )
    if _MEAN not in kinds:
        raise PipelineModelError(told)
    rank_zero_warn(f"If a term of the loss is a sum over samples: {told}")


def _reductions(node: Any, samples: int) -> Iterator[str]:
    """Yield how each term of a loss was reduced to one number."""
    if node is None:
        return
    name = node.name()
    reduction = getattr(node, "_saved_reduction", None)
    if reduction in _REDUCTIONS:
        yield _REDUCTIONS[reduction] if _goes_by(tuple(node._saved_self.shape), samples) else _OTHER
    elif name.startswith("Mean"):
        yield _MEAN
    elif name.startswith("Sum"):
        of_parts = any(behind is not None and behind.name().startswith(_TOGETHER) for behind, _ in node.next_functions)
        yield _SUM if _goes_by(_summed(node), samples) and not of_parts else _OTHER
    elif name.startswith(_PASSED):
        for behind, _ in node.next_functions:
            yield from _reductions(behind, samples)
    else:
        yield _OTHER


def _summed(node: Any) -> tuple[int, ...]:
    return tuple(map(int, getattr(node, "_saved_self_sym_sizes", ())))


def _goes_by(shape: tuple[int, ...], samples: int) -> bool:
    """Whether the first axis may be that of samples, or of all samples' tokens concatenated."""
    return bool(shape) and shape[0] >= samples and shape[0] % samples == 0
