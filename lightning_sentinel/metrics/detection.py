"""Detection metrics: how well the detected workers match the workers that tampered.

A positive is a malicious worker. All metrics accumulate over updates, one for each run, so that several runs can be judged
together. Every rank knows the same verdicts and updates with the same sets; synchronised values then equal the local ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall, BinaryStatScores

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.metrics.functional import confusion

if TYPE_CHECKING:
    from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

__all__ = ["DetectionDelay", "DetectionF1", "DetectionPrecision", "DetectionRecall", "FalsePositiveRate"]


class _OverWorkers(BinaryStatScores):
    """Turns a binary classification metric, the next class in the method resolution order, into one over workers."""

    _no_division = 1
    """The value where the denominator is zero, unless the user sets one."""

    def __init__(
        self, stages: int, replicas: int, *, validate_args: bool = True, zero_division: float | None = None, **kwargs: Any
    ) -> None:
        division = self._no_division if zero_division is None else zero_division
        super().__init__(validate_args=validate_args, zero_division=division, **kwargs)
        self.mesh = Mesh(stages, replicas)

    def update(self, detected: Collection[Worker], malicious: Collection[Worker]) -> None:
        """Count one run.

        Args:
            detected: the detected workers, for example ``strategy.ledger.banned``.
            malicious: the workers that tampered, for example ``injector.workers``.

        Raises:
            ConfigurationError: if a worker is not in the mesh.
        """
        preds, target = confusion(detected, malicious, self.mesh)
        super().update(preds.to(self.device), target.to(self.device))


class DetectionPrecision(_OverWorkers, BinaryPrecision):
    """Share of the detected workers that were malicious: TP / (TP + FP), a 0-dim tensor.

    1 if no worker was detected: there is no false alarm.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        validate_args: whether arguments are checked, as in torchmetrics.
        zero_division: the value where the denominator is zero, 0 or 1; ``None`` for 1.
        kwargs: what every torchmetrics ``Metric`` takes.

    Raises:
        ConfigurationError: if the mesh has no workers, or ``update`` is given a worker outside it.
        ValueError: if ``zero_division`` is neither 0 nor 1.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.metrics import DetectionPrecision
        >>> metric = DetectionPrecision(stages=2, replicas=2)
        >>> metric.update(detected={Worker(0, 0), Worker(1, 1)}, malicious={Worker(1, 1)})
        >>> metric.compute()
        tensor(0.5000)
    """


class DetectionRecall(_OverWorkers, BinaryRecall):
    """Share of the malicious workers that were detected: TP / (TP + FN), a 0-dim tensor.

    1 if no worker was malicious: there is none to miss.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        validate_args: whether arguments are checked, as in torchmetrics.
        zero_division: the value where the denominator is zero, 0 or 1; ``None`` for 1.
        kwargs: what every torchmetrics ``Metric`` takes.

    Raises:
        ConfigurationError: if the mesh has no workers, or ``update`` is given a worker outside it.
        ValueError: if ``zero_division`` is neither 0 nor 1.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.metrics import DetectionRecall
        >>> metric = DetectionRecall(stages=2, replicas=2)
        >>> metric.update(detected={Worker(1, 1)}, malicious={Worker(0, 1), Worker(1, 1)})
        >>> metric.compute()
        tensor(0.5000)
    """


class DetectionF1(_OverWorkers, BinaryF1Score):
    """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN), a 0-dim tensor.

    The score by which SENTINEL reports detection (arXiv 2603.03592). 1 if no worker was malicious and none detected.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        validate_args: whether arguments are checked, as in torchmetrics.
        zero_division: the value where the denominator is zero, 0 or 1; ``None`` for 1.
        kwargs: what every torchmetrics ``Metric`` takes.

    Raises:
        ConfigurationError: if the mesh has no workers, or ``update`` is given a worker outside it.
        ValueError: if ``zero_division`` is neither 0 nor 1.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.metrics import DetectionF1
        >>> metric = DetectionF1(stages=2, replicas=2)
        >>> metric.update(detected={Worker(0, 0), Worker(1, 1)}, malicious={Worker(1, 1)})
        >>> metric.compute()
        tensor(0.6667)
    """


class FalsePositiveRate(_OverWorkers):
    """Share of the honest workers that were detected by mistake: FP / (FP + TN), a 0-dim tensor.

    0 if no worker was honest: there is none to accuse wrongly.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        validate_args: whether arguments are checked, as in torchmetrics.
        zero_division: the value where the denominator is zero, 0 or 1; ``None`` for 0.
        kwargs: what every torchmetrics ``Metric`` takes.

    Raises:
        ConfigurationError: if the mesh has no workers, or ``update`` is given a worker outside it.
        ValueError: if ``zero_division`` is neither 0 nor 1.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.metrics import FalsePositiveRate
        >>> metric = FalsePositiveRate(stages=2, replicas=2)
        >>> metric.update(detected={Worker(0, 0)}, malicious=set())
        >>> metric.compute()
        tensor(0.2500)
    """

    _no_division = 0
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        """Return the rate."""
        # Not 1 - BinarySpecificity, whose zero_division would be the other way round.
        _, false_alarms, trusted, *_ = super().compute()
        honest = false_alarms + trusted
        return torch.where(honest > 0, false_alarms / honest.clamp(min=1), float(self.zero_division))

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw one value, or a sequence of them as a curve, the way torchmetrics draws its own metrics.

        Args:
            val: what ``compute()`` returned, by default its current value, or a sequence of such values.
            ax: axes to draw on, by default those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self._plot(val, ax)


class DetectionDelay(MeanMetric):
    """Mean number of steps from a worker's first tampering to its ban, a 0-dim tensor; NaN if no worker was caught.

    A worker that tampered and was never banned has no delay; ``missed`` counts it. A ban of a worker that never
    tampered, or had not yet, is a false positive, not a quick detection: it counts neither here nor in ``missed``.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        kwargs: what every torchmetrics ``MeanMetric`` takes.

    Attributes:
        missed: 0-dim integer tensor, how many workers tampered and were never banned. Local to this process.

    Raises:
        ConfigurationError: if the mesh has no workers, or ``update`` is given a worker outside it.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.metrics import DetectionDelay
        >>> metric = DetectionDelay(stages=2, replicas=2)
        >>> metric.update(started={Worker(0, 0): 100, Worker(1, 0): 100}, banned={Worker(0, 0): 104})
        >>> metric.compute(), metric.missed
        (tensor(4.), tensor(1))
    """

    higher_is_better = False  # type: ignore[assignment]
    plot_lower_bound = 0.0

    missed: Tensor

    def __init__(self, stages: int, replicas: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mesh = Mesh(stages, replicas)
        self.add_state("missed", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, started: Mapping[Worker, int], banned: Mapping[Worker, int]) -> None:  # type: ignore[override]
        """Count one run.

        Args:
            started: the step in which each malicious worker tampered first.
            banned: the step in which each banned worker was banned.

        Raises:
            ConfigurationError: if a worker is not in the mesh.
        """
        preds, target = confusion(banned, started, self.mesh)
        self.missed = self.missed + (target & ~preds).sum().to(self.device)
        delays = [banned[worker] - step for worker, step in started.items() if worker in banned]
        super().update(torch.tensor([delay for delay in delays if delay >= 0], dtype=self.dtype, device=self.device))
