"""Removes micro-batches that are left out from statistics that steps update: BatchNorm buffers and metric states.

A BatchNorm moves its running mean in every forward pass, and a metric accumulates its inputs. Whether a micro-batch counts is known
only on the device, for which we do not wait. So buffers and tensor states are restored by ``torch.where``; entries appended to list
states are removed at the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["MetricStates", "RunningStatistics"]


class RunningStatistics:
    """Buffers that forward passes change in place, such as BatchNorm's running mean.

    Args:
        buffers: all buffers of the stage.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> moving = RunningStatistics(norm.buffers())
        >>> for left_out in (True, False):
        ...     before = moving.copies()
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        ...     moving.put_back(before, torch.tensor(left_out))
        ...     print(norm.running_mean, norm.num_batches_tracked)
        tensor([0.]) tensor(0)
        tensor([0.2000]) tensor(1)
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = list(buffers)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers, with copies of their present values."""
        return [(buffer, buffer.clone()) for buffer in self._buffers]

    def put_back(self, before: Sequence[tuple[Tensor, Tensor]], left_out: Tensor) -> None:
        """Restore the copies if ``left_out``, a 0-dim bool, without waiting for it."""
        for buffer, copy in before:
            # Through .data, so that autograd's version counter of the buffer, which a backward pass may check, stays.
            buffer.data.copy_(torch.where(left_out, copy, buffer))


class _Appended(NamedTuple):
    metric: Metric
    name: str
    start: int
    stop: int
    counts: Tensor


class MetricStates:
    """States of a module's metrics.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._appended: list[_Appended] = []

    def copies(self) -> list[tuple[Metric, dict[str, Any]]]:
        """The metrics, with copies of their present states; of list states only the length."""
        metrics = [metric for metric in self._module.modules() if isinstance(metric, Metric)]
        return [(metric, {name: _noted(state) for name, state in metric.metric_state.items()}) for metric in metrics]

    def put_back(self, before: Sequence[tuple[Metric, dict[str, Any]]], counts: Tensor) -> None:
        """Restore the copies unless the micro-batch ``counts``, a 0-dim bool, without waiting for it."""
        for metric, states in before:
            for name, old in states.items():
                now = getattr(metric, name)
                if isinstance(now, list):
                    if len(now) > old:
                        self._appended.append(_Appended(metric, name, old, len(now), counts))
                elif now is not old and now.shape == old.shape:
                    setattr(metric, name, torch.where(counts, now, old))

    def forget(self) -> None:
        """Begin a step, or repeat it: entries appended in the last attempt are gone already."""
        self._appended = []

    def end_step(self) -> None:
        """Remove list entries of micro-batches that were left out; waits for the device if entries were appended."""
        appended = self._appended
        self._appended = []
        if appended:
            counted = torch.stack([one.counts for one in appended]).tolist()
            # In reverse, so that earlier indices stay valid.
            for one, counts in reversed(list(zip(appended, counted))):
                if not counts:
                    del getattr(one.metric, one.name)[one.start : one.stop]


def _noted(state: Tensor | list[Tensor]) -> Tensor | int:
    return len(state) if isinstance(state, list) else state.detach().clone()
