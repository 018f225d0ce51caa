"""The anomaly score metric: how far the signals of every worker are from expected ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sentinel.errors import ConfigurationError, MissingExtraError
from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.metrics.functional import nanmax

if TYPE_CHECKING:
    from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

__all__ = ["AnomalyScore"]

FENCE = 1.0
HOTTEST = 3.0
CAP = 10.0
"""The highest value of a score in a mean: the million of a signal that is not finite would hide all others."""


class AnomalyScore(Metric):
    """Mean anomaly score of every worker, and the highest of them.

    The anomaly score of a signal says how far it is from what its boundary has learned to expect: 0 is expected, 1 is
    at the fence, anything above 1 is flagged (SENTINEL, arXiv 2603.03592). A signal with values that are not finite has the highest
    score, a million. In a mean no finite score counts more than 10: beyond ten times the fence the distance does not matter, and
    one such step must not hide the others. A score of infinity makes the mean of its worker infinite for good.

    ``update`` takes the scores of one step, a floating tensor of shape ``(stages, replicas, 2)``, the last dim in the
    order (activation, gradient), NaN where a worker sent nothing or the signal was not scored: the last stage sends no
    activation, the first no gradient. ``compute`` returns a 0-dim tensor: the highest mean score over all workers and
    directions, NaN if nothing was scored. Calling the metric, ``metric(scores)``, updates it and returns the highest
    score of that step alone, which ``latest`` keeps, whatever its size.

    Every rank of a mesh knows all scores, and updates with the same tensor: synchronised means then equal the local ones.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.
        kwargs: what every torchmetrics ``Metric`` takes.

    Attributes:
        latest: the highest score of the last step, 0-dim; over ranks, and where two metrics are merged, the higher one.

    Raises:
        ConfigurationError: if the mesh has no workers.

    Example:
        >>> import torch
        >>> from lightning_sentinel.metrics import AnomalyScore
        >>> nan = float("nan")
        >>> metric = AnomalyScore(stages=2, replicas=2)
        >>> metric.update(torch.tensor([[[0.5, nan], [1.0, nan]], [[nan, 0.25], [nan, 0.5]]]))
        >>> metric.update(torch.tensor([[[0.5, nan], [3.0, nan]], [[nan, 0.25], [nan, 0.5]]]))
        >>> metric.compute(), metric.latest
        (tensor(2.), tensor(3.))
        >>> metric.matrix()
        tensor([[0.5000, 2.0000],
                [0.2500, 0.5000]])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    count: Tensor
    latest: Tensor

    def __init__(self, stages: int, replicas: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mesh = Mesh(stages, replicas)
        shape = (stages, replicas, len(Direction))
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        # torchmetrics' own "max" would let the NaN of a rank that scored nothing win.
        self.add_state("latest", torch.tensor(torch.nan), dist_reduce_fx=nanmax)

    def update(self, scores: Tensor) -> None:
        """Add the scores of one step.

        Args:
            scores: shape ``(stages, replicas, 2)``, NaN where nothing was scored.

        Raises:
            ConfigurationError: if the shape is not that of the mesh.
        """
        if scores.shape != self.total.shape:
            raise ConfigurationError(
                f"AnomalyScore.update() was given scores of shape {tuple(scores.shape)}, but {self.mesh} needs"
                f" (stages, replicas, directions) = {tuple(self.total.shape)}. Give NaN where nothing was scored."
            )
        scores = scores.detach().to(self.total)
        scored = ~scores.isnan()
        self.total = self.total + scores.where(scores.isinf(), scores.clamp(max=CAP)).where(scored, 0.0)
        self.count = self.count + scored
        self.latest = nanmax(scores.flatten())

    def forward(self, scores: Tensor) -> Tensor:
        """Add the scores of one step and return the highest of them, a 0-dim tensor; see ``update``."""
        super().forward(scores)
        # torchmetrics merged the step into the state as if it came from another rank, so an earlier step may have won.
        self.latest = nanmax(scores.detach().to(self.total).flatten())
        return self.latest

    def compute(self) -> Tensor:
        """Return the highest mean score over workers and directions, 0-dim; NaN if nothing was scored."""
        return nanmax(self._means().flatten())

    def matrix(self) -> Tensor:
        """Return the mean score of every worker: shape ``(stages, replicas)``, NaN where nothing was scored.

        A worker that sends in both directions has the higher of its two means. Nothing is communicated, so one rank may
        call this alone.
        """
        return nanmax(self._means(), dim=-1)

    def _means(self) -> Tensor:
        return self.total / self.count

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw a heat map of stages x replicas; orange is above the fence, purple below, hatched was not scored.

        The colours always span 0 to 3, so that figures of different runs can be compared and one outlier does not wash
        out the others; every cell has its value written on it.

        Args:
            val: what ``matrix()`` returned, by default its current value. A 0-dim tensor, or a sequence of them, as the metric
                returns when called, is drawn as a curve over the steps like any torchmetrics value.
            ax: axes to draw on, by default those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            MissingExtraError: if matplotlib is not installed.
            ConfigurationError: if ``val`` is a tensor that is neither 0-dim nor of shape ``(stages, replicas)``.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingExtraError("matplotlib", "report", "AnomalyScore.plot()") from error

        if val is None:
            val = self.matrix()
        if not isinstance(val, Tensor) or val.ndim == 0:
            return self._plot(val, ax)
        stages = self.mesh.stages
        replicas = self.mesh.replicas
        if val.shape != (stages, replicas):
            raise ConfigurationError(
                f"AnomalyScore.plot() was given a tensor of shape {tuple(val.shape)}, but {self.mesh} needs"
                f" (stages, replicas) = {(stages, replicas)}: give it what matrix() returns."
            )

        if ax is None:
            _, ax = plt.subplots(figsize=(2.5 + 0.7 * replicas, 1.5 + 0.6 * stages), layout="constrained")
        means = val.detach().cpu().float()
        ax.patch.set(facecolor="white", hatch="////", edgecolor="0.7")
        # Infinite values would upset matplotlib's resampling, so they are clipped here rather than by the norm.
        colours = means.clamp(0, HOTTEST).numpy()
        # The fence is in the middle of the colormap; its darkest purple is left out, so that calm workers stay pale.
        image = ax.imshow(colours, cmap="PuOr_r", vmin=2 * FENCE - HOTTEST, vmax=HOTTEST, aspect="auto")
        bar = ax.figure.colorbar(image, ax=ax, extend="max", label="mean anomaly score")
        bar.set_ticks([0, FENCE, 2, HOTTEST], labels=["0", "1 (fence)", "2", "3"])
        bar.ax.set_ylim(0, HOTTEST)
        bar.ax.axhline(FENCE, color="black", linewidth=1.5)
        for worker, mean in zip(sorted(self.mesh), means.flatten().tolist()):
            colour = "white" if mean > 0.75 * HOTTEST else "black"
            text = "-" if math.isnan(mean) else f"{mean:.3g}"
            ax.text(worker.replica, worker.stage, text, ha="center", va="center", color=colour)
        ax.set(xlabel="replica", ylabel="stage", xticks=range(replicas), yticks=range(stages))
        return ax.figure, ax
