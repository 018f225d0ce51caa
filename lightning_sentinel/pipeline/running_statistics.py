"""Statistics that a step updates in passing, without the micro-batches that are left out.

A BatchNorm moves its running mean in every forward pass, and a metric adds up what it sees. Whether a micro-batch counts is known
on the device only, where nobody waits for it, so both are put back by value; what was appended to a list is taken out at the end
of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["MetricStates", "RunningStatistics"]


class RunningStatistics:
    """Buffers that forward passes change in place.

    Args:
        buffers: all that there are.

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
        """The buffers, and what they hold now."""
        return [(buffer, buffer.clone()) for buffer in self._buffers]

    def put_back(self, before: Sequence[tuple[Tensor, Tensor]], left_out: Tensor) -> None:
        """Bring back what they held if ``left_out``, a 0-dim bool that is not waited for."""
        for buffer, copy in before:
            # Not in place for autograd, which counts versions of what a backward pass may look at.
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
        """The metrics, and their states now: of lists how long they are."""
        metrics = [metric for metric in self._module.modules() if isinstance(metric, Metric)]
        return [(metric, {name: _noted(state) for name, state in metric.metric_state.items()}) for metric in metrics]

    def put_back(self, before: Sequence[tuple[Metric, dict[str, Any]]], counts: Tensor) -> None:
        """Bring back what they were unless the micro-batch ``counts``, a 0-dim bool that is not waited for."""
        for metric, states in before:
            for name, old in states.items():
                now = getattr(metric, name)
                if isinstance(now, list):
                    if len(now) > old:
                        self._appended.append(_Appended(metric, name, old, len(now), counts))
                elif now is not old and now.shape == old.shape:
                    setattr(metric, name, torch.where(counts, now, old))

    def forget(self) -> None:
        """Begin a step, or begin it again: what was appended in the last attempt is gone already."""
        self._appended = []

    def end_step(self) -> None:
        """Take out of lists what did not count; waits for the device where there are any."""
        appended, self._appended = self._appended, []
        if appended:
            counted = torch.stack([one.counts for one in appended]).tolist()
            # From behind, so that places stay what they are.
            for one, counts in reversed(list(zip(appended, counted))):
                if not counts:
                    del getattr(one.metric, one.name)[one.start : one.stop]


def _noted(state: Tensor | list[Tensor]) -> Tensor | int:
    return len(state) if isinstance(state, list) else state.detach().clone()
