"""Stateless functions of the metrics: from workers and scores to tensors."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker

__all__ = ["confusion", "nanmax"]


def confusion(detected: Collection[Worker], malicious: Collection[Worker], mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Write two sets of workers as the predictions and targets of a binary classification.

    Args:
        detected: the detected workers, for example ``strategy.ledger.banned``.
        malicious: the workers that tampered, for example ``injector.workers``.
        mesh: all workers.

    Returns:
        ``(preds, target)``, two boolean vectors of shape ``(mesh.size,)`` in the order of the ranks.

    Raises:
        ConfigurationError: if a worker is not in the mesh.

    Example:
        >>> from lightning_sentinel.mesh import Mesh, Worker
        >>> preds, target = confusion({Worker(1, 0)}, {Worker(1, 0), Worker(1, 1)}, Mesh(stages=2, replicas=2))
        >>> preds, target
        (tensor([ True, False, False, False]), tensor([ True,  True, False, False]))
    """
    return _membership(detected, mesh), _membership(malicious, mesh)


def _membership(workers: Collection[Worker], mesh: Mesh) -> Tensor:
    member = torch.zeros(mesh.size, dtype=torch.bool)
    member[[mesh.rank(worker) for worker in workers]] = True
    return member


def nanmax(values: Tensor, dim: int = 0) -> Tensor:
    """Return the maximum along one dim, ignoring NaN; NaN where all values are.

    Args:
        values: floating point, any shape.
        dim: the dim that is reduced.

    Returns:
        The shape of ``values`` without ``dim``.

    Example:
        >>> nan = float("nan")
        >>> nanmax(torch.tensor([[0.5, nan], [2.0, nan]]))
        tensor([2., nan])
    """
    highest = values.masked_fill(values.isnan(), -torch.inf).amax(dim)
    return highest.masked_fill(values.isnan().all(dim), torch.nan)
