"""The process groups of a run: one of each stage's healthy ranks, and one of each set of stages that share parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta

import torch.distributed as dist

from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes import wire

__all__ = ["StageGroups", "first_healthy", "group_of", "require_healthy"]

_made: dict[tuple[tuple[int, ...], timedelta], dist.ProcessGroup] = {}
"""Groups that this process has made, kept for later runs: each has its own connections, and new groups would add more."""
_made_in: dist.ProcessGroup | None = None


def group_of(ranks: tuple[int, ...], timeout: timedelta) -> dist.ProcessGroup:
    """The group of these ranks, made if it is new. All ranks must call this, and must have made the same groups before."""
    global _made_in
    if _made_in is not dist.group.WORLD:
        _made.clear()
        _made_in = dist.group.WORLD
    if (ranks, timeout) not in _made:
        _made[ranks, timeout] = wire.make_group(ranks, timeout)
    return _made[ranks, timeout]


class StageGroups:
    """Process groups of the healthy ranks of each stage, and of several stages together.

    Args:
        mesh: all workers, one a rank.
        rank: this process's rank.
        timeout: how long the members of a group wait for each other.
        across: sets of stages that get a group.
    """

    def __init__(self, mesh: Mesh, rank: int, timeout: timedelta, across: Sequence[tuple[int, ...]] = ()) -> None:
        self.mesh = mesh
        self._rank = rank
        self._timeout = timeout
        self._sets = [*((stage,) for stage in range(mesh.stages)), *across]
        self._members: list[tuple[int, ...]] = [()] * len(self._sets)
        self._mine: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def healthy(self, banned: Collection[Worker]) -> dist.ProcessGroup | None:
        """The group of the workers of this rank's stage that are not banned.

        The first call makes the groups. A call with other banned workers than the previous one remakes those whose members change.
        Such a call is a collective of *all* ranks, banned ones included, which must all name the same workers. Do not use a group
        once a later call has replaced it.

        Returns:
            ``None`` if this rank is banned.

        Raises:
            MeshExhaustedError: on all ranks, if a stage has no healthy worker.
        """
        members = [
            tuple(rank for stage in stages for rank in self.mesh.stage_ranks(stage) if self.mesh.worker(rank) not in banned)
            for stages in self._sets
        ]
        require_healthy(members[: self.mesh.stages])
        replaces = any(before not in ((), now) for before, now in zip(self._members, members))
        outdated: list[dist.ProcessGroup] = []
        for stages, before, ranks in zip(self._sets, self._members, members):
            if ranks == before:
                continue
            _made.pop((before, self._timeout), None)
            group = group_of(ranks, self._timeout)
            if stages in self._mine:
                outdated.append(self._mine.pop(stages))
            if self._rank in ranks:
                self._mine[stages] = group
        self._members = members
        if replaces:
            # Making a group does not wait for other ranks: one still busy in an old group would find its connections closed.
            wire.barrier()
        for old in outdated:
            wire.drop_group(old)
        return self.own

    @property
    def own(self) -> dist.ProcessGroup | None:
        """The result of the last call of :meth:`healthy`."""
        return self._mine.get((self.mesh.worker(self._rank).stage,))

    def across(self, stages: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these stages' healthy ranks, of which this rank must be one."""
        return self._mine[stages]


def first_healthy(mesh: Mesh, stage: int, banned: Collection[object]) -> int:
    """The first rank of a stage that is not banned, which speaks for the stage."""
    return next(rank for rank in mesh.stage_ranks(stage) if mesh.worker(rank) not in banned)


def require_healthy(members: Sequence[Sequence[int]]) -> None:
    for stage, ranks in enumerate(members):
        if not ranks:
            raise MeshExhaustedError(
                f"All workers of stage {stage} are banned: nobody is left who could reduce its gradients. Start again from a"
                " checkpoint with other machines for this stage."
            )
