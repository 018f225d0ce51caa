"""Metric objects on ranks where no step runs: warns if one is computed in the middle of an epoch, because it has seen no data."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

from torchmetrics import Metric

from lightning_sentinel.pipeline.batch_metrics import alone

__all__ = ["NothingHere"]


class NothingHere:
    """A metric's ``distributed_available_fn``, which torchmetrics calls when the metric is computed: it waits for no other rank.

    If the metric is computed in the middle of an epoch, without an update because steps run on other ranks, it warns once.

    Args:
        name: of the metric in the module.
        metric: the metric.
        stage: this rank's stage.
        under_way: the epochs in which steps have run; empty outside of epochs.
        said: names of the metrics for which the warning has been given.
    """

    def __init__(self, name: str, metric: Metric, stage: int, under_way: Collection[str], said: set[str]) -> None:
        self._name = name
        self._stage = stage
        self._under_way = under_way
        self._said = said
        self._metric = weakref.ref(metric)

    def __call__(self) -> bool:
        metric = self._metric()
        if metric is not None and self._under_way and not metric.update_called and self._name not in self._said:
            self._said.add(self._name)
            warnings.warn(
                f"self.{self._name}.compute() in the middle of an epoch: stage {self._stage} runs no whole step, so that here this"
                f" {type(metric).__name__} has seen nothing. Until the epoch ends its value is on the ranks of the last stage, such"
                " as rank zero, and there that of one replica. Compute it at the end of the epoch, when all ranks get the value of"
                " all replicas; or let the step log it, self.log(..., on_step=True).",
                stacklevel=2,
            )
        return alone()

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Pickle as a plain function: a copy of the metric, or one in a saved module, belongs to no run."""
        return _alone, ()


def _alone() -> Callable[[], bool]:
    return alone
