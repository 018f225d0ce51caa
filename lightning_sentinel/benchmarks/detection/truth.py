"""What really happened in a run: how far a malicious worker's work was from an honest one's, and the norms of the gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.mesh import Worker
from lightning_sentinel.verification.audit import relative_error

__all__ = ["LARGEST", "MADE", "GradientNorms", "Truth", "Work"]

MADE = ("activation", "gradient", "weights")
"""What a worker makes of a micro-batch: two signals, and its part of the gradients of its stage's weights."""

LARGEST = 1e9
"""Stands for all larger errors, infinite ones too."""


@dataclass(frozen=True)
class Work:
    """What a malicious worker made of a micro-batch, where it differs at all from what an honest one would have made.

    Args:
        worker: that made it.
        step: of the run.
        micro_batch: its index among those of the worker.
        errors: relative errors of :data:`MADE`, at most :data:`LARGEST`; of signals as audits measure them.
    """

    worker: Worker
    step: int
    micro_batch: int
    errors: tuple[float, float, float]

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.errors)

    @property
    def row(self) -> list[float]:
        """Plain numbers, for files."""
        return [self.worker.stage, self.worker.replica, self.step, self.micro_batch, *self.errors]

    @classmethod
    def of(cls, row: list[float]) -> Work:
        stage, replica, step, micro_batch, *errors = row
        return cls(Worker(int(stage), int(replica)), int(step), int(micro_batch), (errors[0], errors[1], errors[2]))


class Truth:
    """A witness for an adversary: keeps how far each thing was off. Of a step that is done again the larger error counts.

    Example:
        >>> truth = Truth()
        >>> truth(Worker(1, 0), "weights", 7, 0, torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]))
        >>> truth(Worker(1, 0), "gradient", 7, 0, torch.ones(2, 2), torch.ones(2, 2))
        >>> [(work.step, round(work.error, 3)) for work in truth.works]
        [(7, 0.171)]
    """

    def __init__(self) -> None:
        self._errors: dict[tuple[Worker, int, int], dict[str, float]] = {}

    def __call__(self, worker: Worker, made: str, step: int, micro_batch: int, found: Tensor, honest: Tensor) -> None:
        off = _error(found, honest) if made == "weights" else relative_error(found, honest)
        errors = self._errors.setdefault((worker, step, micro_batch), {})
        errors[made] = max(errors.get(made, 0.0), min(float(off), LARGEST))

    @property
    def works(self) -> list[Work]:
        """In the order of steps; those without an error are left out."""
        works = [
            Work(worker, step, micro_batch, (errors.get(MADE[0], 0.0), errors.get(MADE[1], 0.0), errors.get(MADE[2], 0.0)))
            for (worker, step, micro_batch), errors in self._errors.items()
        ]
        return sorted((work for work in works if work.error), key=lambda work: (work.step, work.worker, work.micro_batch))


def _error(found: Tensor, honest: Tensor) -> Tensor:
    """The norm of the difference over that of the honest tensor; zero if both are the same, finite or not."""
    off = torch.linalg.vector_norm(found - honest) / (torch.linalg.vector_norm(honest) + 1e-30)
    same = ((found == honest) | (found.isnan() & honest.isnan())).all()
    return torch.where(same, 0.0, off.nan_to_num(torch.inf, torch.inf))


class GradientNorms(L.Callback):
    """Keeps the norm of the gradients that every step of the optimizer gets, before clipping; checkpoints hold it."""

    def __init__(self) -> None:
        self.norms: list[float | None] = []
        """By step; ``None`` where it is not finite."""

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        norm = float(get_total_norm([one.grad for one in pl_module.parameters() if one.grad is not None]))
        self.norms.append(norm if math.isfinite(norm) else None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.norms}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.norms = list(state_dict["norms"])
