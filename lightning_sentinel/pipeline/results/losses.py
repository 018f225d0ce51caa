"""Whether a loss is a mean over its samples, which is what micro-batches and replicas are averaged by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError

__all__ = ["refuse_sum"]

_MEAN, _SUM, _OTHER = "mean", "sum", "other"
_PASSED = ("Add", "Sub", "Neg", "View", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Select")
"""Operations, by how their names begin, that leave a reduction what it is; a quotient may have made a mean of it."""
_TOGETHER = ("Stack", "Cat")
_REDUCTIONS = {1: _MEAN, 2: _SUM}


def refuse_sum(loss: Tensor, samples: int, step: str) -> None:
    """Look at how a loss came about, which costs no computation.

    Args:
        loss: of a micro-batch, with its graph.
        samples: of the micro-batch.
        step: that returned it.

    Raises:
        PipelineModelError: if it is a sum over samples. The mean over micro-batches would be as many times too small.
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
    """How the terms of a loss were reduced to one number."""
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
    """Whether samples, or their tokens one behind the other, may be along the first axis."""
    return bool(shape) and shape[0] >= samples and shape[0] % samples == 0
