"""The wires inside stages: one of each stage's healthy ranks, and one of each set of stages that share parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta

from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.wire import Wire, world

__all__ = ["StageGroups", "first_healthy", "require_healthy"]


class StageGroups:
    """Wires of the healthy ranks of each stage, and of several stages together.

    Args:
        mesh: all workers, one a rank.
        rank: this process's rank.
        timeout: how long the members of a wire wait for each other.
        across: sets of stages that get a wire.
    """

    def __init__(self, mesh: Mesh, rank: int, timeout: timedelta, across: Sequence[tuple[int, ...]] = ()) -> None:
        self.mesh = mesh
        self._rank = rank
        self._timeout = timeout
        self._sets = [*((stage,) for stage in range(mesh.stages)), *across]
        self._wires: dict[tuple[int, ...], Wire] = {}

    def healthy(self, banned: Collection[Worker]) -> Wire | None:
        """The wire of the workers of this rank's stage that are not banned.

        The first call makes the wires. A call with other banned workers than the previous one remakes those whose members change.
        Such a call is a collective of *all* ranks, banned ones included, which must all name the same workers. Do not use a wire
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
        everyone = world()
        outdated: list[Wire] = []
        for stages, ranks in zip(self._sets, members):
            before = self._wires.get(stages)
            if before is not None and before.ranks == ranks:
                continue
            self._wires[stages] = everyone.among(ranks, self._timeout)
            if before is not None:
                outdated.append(before)
        if outdated:
            # Making a wire does not wait for other ranks: one still busy in an old wire would find its connections closed.
            everyone.barrier()
        for old in outdated:
            everyone.drop(old)
        return self.own

    @property
    def own(self) -> Wire | None:
        """The result of the last call of :meth:`healthy`."""
        wire = self._wires.get((self.mesh.worker(self._rank).stage,))
        return wire if wire is not None and self._rank in wire.ranks else None

    def across(self, stages: tuple[int, ...]) -> Wire:
        """The wire of these stages' healthy ranks, of which this rank must be one."""
        return self._wires[stages]


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
