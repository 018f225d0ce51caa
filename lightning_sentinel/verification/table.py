"""The table of a step: one row for every signal that crossed a boundary, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.verification.features import FEATURES

__all__ = ["COLUMNS", "SignalTable", "signal_row"]

COLUMNS = (*FEATURES, "score", "worst", "flagged", "tainted", "positions")


def signal_row(features: Tensor, score: Tensor, worst: Tensor, flagged: Tensor, tainted: Tensor, positions: int) -> Tensor:
    """One row, ``(len(COLUMNS),)`` float32, built on the signal's device without waiting for it.

    Args:
        features: ``(F,)``.
        score: 0-dim, 1 at the fence.
        worst: 0-dim, index of the feature with the highest score; -1 if the signal is not finite.
        flagged: 0-dim bool, the verdict at receipt.
        tainted: 0-dim bool, whether an earlier boundary had flagged the micro-batch, so that this one proves nothing.
        positions: length of the signal's position axis.
    """
    rest = torch.stack([column.float() for column in (score, worst, flagged, tainted)])
    return torch.cat((features, rest, features.new_full((1,), positions)))


@dataclass(frozen=True)
class SignalTable:
    """Rows of all signals of a step.

    Args:
        rows: ``(boundaries, replicas, micro_batches, len(COLUMNS))`` on the host, boundaries in the order of
            :attr:`Mesh.boundaries`.
    """

    rows: Tensor

    def column(self, name: str) -> Tensor:
        """``(boundaries, replicas, micro_batches)``."""
        return self.rows[..., COLUMNS.index(name)]

    @property
    def features(self) -> Tensor:
        """``(boundaries, replicas, micro_batches, F)``."""
        return self.rows[..., : len(FEATURES)]

    @property
    def flagged(self) -> Tensor:
        return self.column("flagged").bool()

    @property
    def tainted(self) -> Tensor:
        return self.column("tainted").bool()

    def worker_scores(self, mesh: Mesh) -> Tensor:
        """The highest score of each worker in the step: ``(stages, replicas, 2)``, activation and gradient; NaN where nothing was
        sent, or nothing could be verified."""
        scores = torch.where(self.tainted, -torch.inf, self.column("score")).amax(dim=2)
        result = torch.full((mesh.stages, mesh.replicas, len(Direction)), torch.nan)
        for boundary, values in zip(mesh.boundaries, scores):
            result[boundary.sender, :, list(Direction).index(boundary.direction)] = values
        return torch.where(result.isinf(), torch.nan, result)
