"""Checks that a loss is a mean over its samples, as averaging over micro-batches and replicas requires."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError

__all__ = ["refuse_sum"]

_MEAN, _SUM, _OTHER = "mean", "sum", "other"
_PASSED = ("Add", "Sub", "Neg", "View", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Select")
"""Name prefixes of operations that keep the kind of a reduction. Not division, which may turn a sum into a mean."""
_TOGETHER = ("Stack", "Cat")
_REDUCTIONS = {1: _MEAN, 2: _SUM}


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
