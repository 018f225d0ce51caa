"""What the workers of a stage add up, among those that are not banned."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_sentinel.config import Response
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.gradients.reduction import (
    StageGroups,
    clip_by_global_norm,
    first_healthy,
    reduce_mean,
    reduce_robustly,
)
from lightning_sentinel.pipeline.gradients.shares import Shares
from lightning_sentinel.pipeline.gradients.ties import TiedStages

__all__ = ["HealthyStage"]


class HealthyStage:
    """This rank's stage without its banned workers.

    Args:
        stage: its layers.
        mesh: all workers.
        worker: that this rank is.
        response: how gradients are aggregated.
        clip_norm: clip the norm of all stages' gradients to this; 0 does not clip.
        timeout: how long ranks of a stage wait for each other.
        device: of the stage.
        tied: what the stage shares with others.
    """

    def __init__(
        self,
        stage: nn.Module,
        mesh: Mesh,
        worker: Worker,
        response: Response,
        clip_norm: float,
        timeout: timedelta,
        device: torch.device,
        tied: TiedStages,
    ) -> None:
        self._stage, self._parameters = stage, list(stage.parameters())
        self._mesh, self._worker = mesh, worker
        self._response, self._clip_norm, self._device = response, clip_norm, device
        self._tied = tied
        self._groups = StageGroups(mesh, mesh.rank(worker), timeout, tied.sets)
        self._group: dist.ProcessGroup | None = None
        self.left_out: frozenset[Worker] = frozenset()

    def begin(self, banned: frozenset[Worker]) -> None:
        """Leave these out from now on; to be called by all ranks, before they do any other thing together."""
        self.left_out, self._group = banned, self._groups.healthy(banned)

    @torch.no_grad()
    def make_equal(self, banned: frozenset[Worker]) -> None:
        """Give the workers of the stage the weights of its first healthy one; to be called by all ranks.

        Without a common seed each process has drawn its own.
        """
        self.begin(banned)
        if self._group is None:
            return
        source = first_healthy(self._mesh, self._worker.stage, banned)
        for tensor in (*self._parameters, *self._stage.buffers()):
            dist.broadcast(tensor.data, source, group=self._group)
        self._tied.make_equal(self._groups, banned)

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
            self._tied.add_up(self._groups, self.left_out)
            return
        workers = [self._mesh.worker(rank) for rank in self._mesh.stage_ranks(self._worker.stage)]
        weights = [shares.of_worker(worker) for worker in workers if worker not in self.left_out]
        reduce_robustly(self._parameters, self._group, divisor, weights, rule, tolerated=self._response.tolerated)
        self._tied.add_up(self._groups, self.left_out)

    def clip(self) -> None:
        """Clip by the norm over all stages."""
        if self._clip_norm > 0:
            elsewhere = self._tied.counted_elsewhere
            clip_by_global_norm(self._parameters, self._clip_norm, self._mesh, self.left_out, self._device, elsewhere)
