"""What the workers of a stage add up, among those that are not banned."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sentinel.config import Response
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.reduction import StageGroups, clip_by_global_norm, reduce_mean, reduce_robustly
from lightning_sentinel.pipeline.shares import Shares

__all__ = ["HealthyStage"]


class HealthyStage:
    """This rank's stage without its banned workers.

    Args:
        parameters: of the stage.
        mesh: all workers.
        worker: that this rank is.
        response: how gradients are aggregated.
        clip_norm: clip the norm of all stages' gradients to this; 0 does not clip.
        timeout: how long ranks of a stage wait for each other.
        device: of the stage.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        mesh: Mesh,
        worker: Worker,
        response: Response,
        clip_norm: float,
        timeout: timedelta,
        device: torch.device,
    ) -> None:
        self._parameters, self._mesh, self._worker = parameters, mesh, worker
        self._response, self._clip_norm, self._device = response, clip_norm, device
        self._groups = StageGroups(mesh, mesh.rank(worker), timeout)
        self._group: dist.ProcessGroup | None = None
        self.left_out: frozenset[Worker] = frozenset()

    def begin(self, banned: frozenset[Worker]) -> None:
        """Leave these out from now on; to be called by all ranks, before they do any other thing together."""
        self.left_out, self._group = banned, self._groups.healthy(banned)

    def sum(self, vector: Tensor) -> Tensor:
        """The sum over the stage, in place; a banned worker keeps its own."""
        if self._group is not None:
            dist.all_reduce(vector, group=self._group)
        return vector

    def reduce(self, shares: Shares) -> None:
        """The gradients of the stage become those of the step."""
        if self._group is None:
            # Nobody asks a banned worker for its weights again.
            for parameter in self._parameters:
                parameter.grad = None
            return
        divisor, rule = self._mesh.replicas * shares.of_stage(self._worker.stage), self._response.aggregation
        if rule == "mean":
            reduce_mean(self._parameters, self._group, divisor)
            return
        workers = [self._mesh.worker(rank) for rank in self._mesh.stage_ranks(self._worker.stage)]
        weights = [shares.of_worker(worker) for worker in workers if worker not in self.left_out]
        reduce_robustly(self._parameters, self._group, divisor, weights, rule, tolerated=self._response.tolerated)

    def clip(self) -> None:
        """Clip by the norm over all stages."""
        if self._clip_norm > 0:
            clip_by_global_norm(self._parameters, self._clip_norm, self._mesh, self.left_out, self._device)
