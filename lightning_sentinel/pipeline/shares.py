"""How much of a step's data reached the weights of each stage, over the batches that are accumulated into one optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CleanShares"]

_NOTHING = 1e-6


class CleanShares:
    """Counts what was excluded.

    Args:
        stages: of the mesh.

    Example:
        >>> import torch
        >>> shares = CleanShares(stages=2)
        >>> clean = torch.tensor([[[False, True]], [[True, True]]])  # stages x replicas x micro-batches
        >>> shares.add(clean, weights=torch.tensor([[0.5, 0.5]]))
        >>> shares.take()
        [0.5, 1.0]
    """

    def __init__(self, stages: int) -> None:
        self._excluded = torch.zeros(stages, dtype=torch.float64)
        self._batches = 0

    def add(self, clean: Tensor | None, weights: Tensor) -> None:
        """Enter a batch.

        Args:
            clean: ``(stages, lanes, micro_batches)`` bool, which gradients count at which stage; ``None`` if all do.
            weights: ``(lanes, micro_batches)``, each micro-batch's share of its replica's batch.
        """
        self._batches += 1
        if clean is not None:
            self._excluded += (weights.double() * ~clean).sum(dim=(1, 2)) / clean.shape[1]

    def take(self) -> list[float] | None:
        """The share of each stage since the last call; exactly 1 where nothing was excluded.

        Returns:
            ``None`` if a stage has nothing to step with: then no stage may move, or they would no longer fit together.
        """
        shares = 1.0 - self._excluded / max(1, self._batches)
        self._excluded, self._batches = torch.zeros_like(self._excluded), 0
        return shares.tolist() if float(shares.min()) > _NOTHING else None
