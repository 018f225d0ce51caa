"""The gradients of a stage, from the backward passes to the optimizer step, over workers that are not banned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.config import Response
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.arithmetic import Arithmetic
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractions
from lightning_sentinel.pipeline.gradients.contributions import broken
from lightning_sentinel.pipeline.gradients.groups import StageGroups, first_healthy
from lightning_sentinel.pipeline.gradients.reduction import clip_by_global_norm, reduce_mean, reduce_robustly
from lightning_sentinel.pipeline.gradients.stash import GradientStash
from lightning_sentinel.pipeline.gradients.ties import TiedStages
from lightning_sentinel.pipeline.gradients.zero import OptimizerShards
from lightning_sentinel.pipeline.processes.wire import Wire

__all__ = ["GradientOptions", "StageGradients"]


class GradientOptions(NamedTuple):
    """What a user chooses about gradients.

    Args:
        response: how they are aggregated.
        sharded: whether each worker keeps only a part of the optimizer's state.
        timeout: how long ranks of a stage wait for each other.
    """

    response: Response
    sharded: bool
    timeout: timedelta


class StageGradients:
    """The gradients of this rank's stage.

    A schedule accumulates them, :meth:`hold` and :meth:`release` carry them through Lightning's loop, then the workers of the stage
    :meth:`reduce`, :meth:`clip` and :meth:`step`.

    Args:
        stage: the stage's layers.
        mesh: all workers.
        worker: the worker that this rank is.
        options: what the user has chosen.
        arithmetic: the precision of the stage, which may scale losses.
        tied: the parameters that the stage shares with other stages.
        optimizer: the user's optimizer; ``None`` for evaluation.
        step: steps it, where losses are not scaled.
    """

    def __init__(
        self,
        stage: nn.Module,
        mesh: Mesh,
        worker: Worker,
        options: GradientOptions,
        arithmetic: Arithmetic,
        tied: TiedStages,
        optimizer: Optimizer | None,
        step: Callable[[], object],
    ) -> None:
        self._stage = stage
        self.parameters = list(stage.parameters())
        self._worker = worker
        self._options = options
        self._arithmetic = arithmetic
        self._tied = tied
        self._groups = StageGroups(mesh, mesh.rank(worker), options.timeout, tied.sets)
        self._optimizer = optimizer
        self._plain_step = step
        self._shards: OptimizerShards | None = None
        self._stash = GradientStash(self.parameters)
        self.left_out: frozenset[Worker] = frozenset()
        """Workers that the reduction leaves out."""

    def begin(self, banned: frozenset[Worker]) -> None:
        """Leave banned workers out from now on; to be called by all ranks, before any other collective of the step."""
        if self._shards is None or banned != self.left_out:
            self._shards = self._sharded_among_all_but(banned)
        self._groups.healthy(banned)
        self.left_out = banned

    @property
    def _wire(self) -> Wire | None:
        """The workers of the stage that are not banned; ``None`` on a banned worker."""
        return self._groups.own

    @torch.no_grad()
    def make_equal(self, banned: frozenset[Worker]) -> None:
        """Broadcast the weights of the stage's first healthy worker to its other workers; to be called by all ranks.

        Without a common seed each process has drawn its own weights.
        """
        self.begin(banned)
        if self._wire is None:
            return
        source = first_healthy(self._groups.mesh, self._worker.stage, banned)
        for tensor in (*self.parameters, *self._stage.buffers()):
            self._wire.broadcast(tensor.data, source)
        self._tied.make_equal(self._groups, banned)

    def sum(self, vector: Tensor) -> Tensor:
        """Sum a vector over the stage's workers that are not banned, in place. On a banned worker it stays as it is."""
        if self._wire is not None:
            self._wire.all_reduce(vector)
        return vector

    def apart(self, vector: Tensor) -> tuple[Tensor, list[Worker]]:
        """All-gathers a vector over the stage's workers that are not banned: ``(workers, len(vector))``, and these workers."""
        workers = [self._groups.mesh.worker(rank) for rank in self._groups.mesh.stage_ranks(self._worker.stage)]
        if self._wire is None:
            return vector[None], [self._worker]
        workers = [worker for worker in workers if worker not in self.left_out]
        return self._wire.all_gather(vector), workers

    def hold(self) -> None:
        """Put the gradients aside: Lightning zeroes them after ``training_step``, in which the backward passes run."""
        self._stash.hold()

    def release(self) -> None:
        """Put the gradients back, where Lightning expects the result of ``backward``."""
        self._stash.release()

    def broken(self) -> Tensor | None:
        """0-dim bool, whether any gradient is not finite; ``None`` under loss scaling, where gradients may overflow."""
        if self._arithmetic.scales:
            return None
        return broken((parameter.grad for parameter in self.parameters), self._arithmetic.device)

    def discard(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self, fractions: CleanFractions) -> None:
        """Replace the gradients by those of the whole step: reduced over replicas, summed over ties, and unscaled.

        Args:
            fractions: how much of the data was not excluded.
        """
        if self._wire is None:
            # A banned worker's weights are never used again.
            self.discard()
        else:
            self._reduce_over(self._wire, fractions)
        self._arithmetic.unscale(self._stepped)

    def _reduce_over(self, wire: Wire, fractions: CleanFractions) -> None:
        divisor = self._groups.mesh.replicas * fractions.of_stage(self._worker.stage)
        rule = self._options.response.aggregation
        if rule == "mean":
            reduce_mean(self.parameters, wire, divisor)
        else:
            workers = [self._groups.mesh.worker(rank) for rank in self._groups.mesh.stage_ranks(self._worker.stage)]
            weights = [fractions.of_worker(worker) for worker in workers if worker not in self.left_out]
            reduce_robustly(self.parameters, wire, divisor, weights, rule, tolerated=self._options.response.tolerated)
        self._tied.add_up(self._groups, self.left_out)

    def clip(self, limit: float, by_value: bool) -> None:
        """Clip the gradients by their norm over all stages, or by value."""
        if by_value:
            nn.utils.clip_grad_value_(self.parameters, limit)
        else:
            elsewhere = self._tied.counted_elsewhere
            clip_by_global_norm(self.parameters, limit, self._groups.mesh, self.left_out, self._arithmetic.device, elsewhere)

    def apply(self, evaluate: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Step the optimizer, and discard the gradients. Between processes a schedule has computed them by now."""
        assert evaluate is None and not options, "a schedule has run by now"
        with nullcontext() if self._shards is None or self._wire is None else self._shards.stepping(self._wire):
            if not self._arithmetic.step(self._stepped):
                self._plain_step()

    @property
    def _stepped(self) -> Optimizer:
        assert self._optimizer is not None, "an evaluation has no optimizer"
        return self._optimizer

    def stepped_by_others(self, banned: frozenset[Worker]) -> frozenset[int]:
        """Parameters, by ``id``, whose optimizer state other ranks keep, where these workers are banned."""
        shards = self._sharded_among_all_but(banned)
        return frozenset() if shards is None else shards.others

    def _sharded_among_all_but(self, banned: frozenset[Worker]) -> OptimizerShards | None:
        if not self._options.sharded:
            return None
        ranks = [rank for rank in self._groups.mesh.stage_ranks(self._worker.stage) if self._groups.mesh.worker(rank) not in banned]
        return OptimizerShards(self.parameters, ranks, self._groups.mesh.rank(self._worker))
