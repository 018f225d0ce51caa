"""Audits: another replica of the same stage recomputes a signal, and the two are compared.

All replicas of a stage hold the same weights, so an honest worker's signal can be had again, up to rounding. What is recomputed is
decided by all ranks from the same data and a secret seed: the audited worker cannot know beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sentinel.mesh import Direction, Mesh

__all__ = ["causal_order", "draw_audits", "relative_error", "tolerance"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a signal counts as recomputed: rounding and another order of summation stay far below it.

    Example:
        >>> tolerance(torch.float32)
        0.001
    """
    return _TOLERANCE[dtype]


def relative_error(claimed: Tensor, recomputed: Tensor) -> Tensor:
    """``norm(claimed - recomputed) / norm(recomputed)`` as a 0-dim tensor; zero if both are bit for bit the same, not finite or not.

    Example:
        >>> relative_error(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0]))
        tensor(0.8000)
    """
    claimed, recomputed = claimed.float(), recomputed.float()
    same = ((claimed == recomputed) | (claimed.isnan() & recomputed.isnan())).all()
    error = torch.linalg.vector_norm(claimed - recomputed) / (torch.linalg.vector_norm(recomputed) + 1e-30)
    return torch.where(same, 0.0, error.nan_to_num(torch.inf, torch.inf))


def draw_audits(mesh: Mesh, micro_batches: int, rate: float, seed: int, step: int) -> Tensor:
    """Which signals of a step are audited whatever they look like, ``(boundaries, lanes, micro_batches)`` bool.

    Args:
        rate: probability of each signal.
        seed: secret.
        step: number of the training batch.

    Example:
        >>> draw_audits(Mesh(3, 4), micro_batches=2, rate=0.5, seed=0, step=7).shape
        torch.Size([4, 4, 2])
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.rand(len(mesh.boundaries), mesh.replicas, micro_batches, generator=generator) < rate


def causal_order(mesh: Mesh) -> list[int]:
    """Indices into :attr:`Mesh.boundaries` in the order in which a micro-batch crosses them: forward, then backward.

    Example:
        >>> causal_order(Mesh(stages=3, replicas=1))
        [0, 1, 3, 2]
    """
    boundaries = list(enumerate(mesh.boundaries))
    forward = [index for index, boundary in boundaries if boundary.direction is Direction.ACTIVATION]
    backward = [index for index, boundary in boundaries if boundary.direction is Direction.GRADIENT]
    return forward + backward[::-1]
