"""The workers of a virtual mesh, shared by all parts of its engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.recovery.guard import Guard

__all__ = ["VirtualWorkers"]


@dataclass
class VirtualWorkers:
    """The workers of a virtual mesh.

    Args:
        mesh: all workers.
        guard: verifies the signals at all boundaries and of all replicas; ``None`` for a plain pipeline.
        device: where they compute.
        adversary: a simulated attacker, which may control some of them; ``None`` if there is none.
    """

    mesh: Mesh
    guard: Guard | None
    device: torch.device
    adversary: Adversary | None = None

    @property
    def excludes(self) -> bool:
        """Whether flagged micro-batches are kept out of the weights at receipt."""
        return self.guard is not None and self.guard.excludes

    @property
    def replaces_malformed(self) -> bool:
        """Whether what is not finite is replaced, and counted against its sender."""
        return self.guard is not None and self.guard.replaces_malformed

    @property
    def shows_contributions(self) -> bool:
        """Whether each worker's contribution to weight gradients is looked at, because those of some are to be wrong."""
        corrupted = self.adversary is not None and self.adversary.corrupts_weight_gradients
        return corrupted and self.guard is not None and self.guard.contributions.audits

    @property
    def audits(self) -> bool:
        """Whether workers recompute each other's signals."""
        return self.guard is not None and self.guard.audits
