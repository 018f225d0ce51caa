"""The mesh: workers, the parts of the model that they serve, and the boundaries between them.

A mesh has ``replicas`` pipelines of ``stages`` stages each. Worker ``(stage, replica)`` serves one stage of one pipeline.
Across the boundary ``b`` an activation travels from stage ``b`` to stage ``b + 1`` and a gradient the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from lightning_sentinel.errors import ConfigurationError

__all__ = ["Boundary", "Direction", "Mesh", "Worker"]


class Direction(str, Enum):
    """What crosses a boundary: activations go forward, gradients go backward."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, order=True)
class Worker:
    """One place in the mesh.

    Example:
        >>> from lightning_sentinel import Worker
        >>> print(Worker(stage=1, replica=0))
        worker (stage 1, replica 0)
    """

    stage: int
    replica: int

    @classmethod
    def of(cls, place: Worker | tuple[int, int] | Mapping[str, int], name: str) -> Worker:
        """A worker from any of the forms in which a user may write it.

        Args:
            place: a worker, a pair ``(stage, replica)``, or the mapping of a configuration file.
            name: of the setting, for the error message.

        Raises:
            ConfigurationError: if it is none of them.

        Example:
            >>> Worker.of((1, 0), "banned")
            Worker(stage=1, replica=0)
        """
        if isinstance(place, cls):
            return place
        if isinstance(place, Mapping) and set(place) == {"stage", "replica"}:
            place = (place["stage"], place["replica"])
        if isinstance(place, (tuple, list)) and len(place) == 2 and all(type(number) is int and number >= 0 for number in place):
            return cls(*place)
        raise ConfigurationError(
            f"{name} contains {place!r}, which is no worker. Write Worker(stage=1, replica=0), or the pair (1, 0) of its stage and"
            " replica, both counted from 0."
        )

    def __str__(self) -> str:
        return f"worker (stage {self.stage}, replica {self.replica})"


@dataclass(frozen=True, order=True)
class Boundary:
    """One direction of the cut between two neighbouring stages: all signals that one stage sends to the other.

    Args:
        index: the cut between stage ``index`` and stage ``index + 1``.
        direction: which of the two streams across that cut.

    Example:
        >>> boundary = Boundary(0, Direction.GRADIENT)
        >>> boundary.sender, boundary.receiver
        (1, 0)
    """

    index: int
    direction: Direction

    @property
    def sender(self) -> int:
        """The stage that sends."""
        return self.index + (self.direction is Direction.GRADIENT)

    @property
    def receiver(self) -> int:
        """The stage that receives, and verifies."""
        return self.index + (self.direction is Direction.ACTIVATION)

    @property
    def name(self) -> str:
        """The name under which the boundary is logged: the sending stage and the direction."""
        return f"stage{self.sender}/{self.direction}"


@dataclass(frozen=True)
class Mesh:
    """A grid of ``stages`` x ``replicas`` workers. ``Worker(s, r)`` is served by rank ``(stages - 1 - s) * replicas + r``.

    So rank zero, where Lightning has its loggers, its progress bar and its files, serves the *last* stage, where steps run whole.

    Args:
        stages: pipeline stages, at least 1.
        replicas: data-parallel pipelines, at least 1.

    Raises:
        ConfigurationError: if one of them is below 1.

    Example:
        >>> mesh = Mesh(stages=3, replicas=2)
        >>> mesh.size, mesh.rank(Worker(1, 0)), mesh.worker(5)
        (6, 2, Worker(stage=0, replica=1))
    """

    stages: int
    replicas: int

    def __post_init__(self) -> None:
        if self.stages < 1 or self.replicas < 1:
            raise ConfigurationError(
                f"A mesh of {self.stages} stages x {self.replicas} replicas has no workers: both must be at least 1."
            )

    @classmethod
    def for_world(cls, world_size: int, stages: int | None = None, replicas: int | None = None) -> Mesh:
        """The mesh of ``world_size`` processes.

        If only one of ``stages`` and ``replicas`` is given the other follows. If neither is, the mesh is as square as the number
        of processes allows, with at least as many stages as replicas: 4 is 2 x 2, 6 is 3 x 2, 5 is one pipeline of 5 stages.

        Raises:
            ConfigurationError: if stages x replicas is not the world size.

        Example:
            >>> Mesh.for_world(6), Mesh.for_world(8, stages=2)
            (Mesh(stages=3, replicas=2), Mesh(stages=2, replicas=4))
        """
        if stages is None and replicas is None:
            replicas = max(r for r in range(1, math.isqrt(world_size) + 1) if world_size % r == 0)
        given = stages if stages is not None else replicas
        if given is None or given < 1 or world_size % given:
            name = "stages" if stages is not None else "replicas"
            raise ConfigurationError(
                f"{name}={given} does not divide the {world_size} processes of this run. Set Trainer(devices=...) to a"
                f" multiple of {given}, or choose {name} from {[n for n in range(1, world_size + 1) if world_size % n == 0]}."
            )
        mesh = cls(
            world_size // given if stages is None else stages,
            world_size // given if replicas is None else replicas,
        )
        if mesh.size != world_size:
            raise ConfigurationError(
                f"stages={stages} x replicas={replicas} needs {mesh.size} processes, but this run has {world_size}. Set"
                f" Trainer(devices={mesh.size}), or leave one of the two out."
            )
        return mesh

    @classmethod
    def largest(cls, processes: int, stages: int | None = None, replicas: int | None = None) -> Mesh:
        """The largest mesh that so many processes can fill; unlike in :meth:`for_world`, processes may be left over.

        Raises:
            ConfigurationError: if they cannot fill any mesh.

        Example:
            >>> Mesh.largest(7, stages=3), Mesh.largest(7, stages=2, replicas=2)
            (Mesh(stages=3, replicas=2), Mesh(stages=2, replicas=2))
        """
        if (stages is None and replicas is None) or any(given is not None and given < 1 for given in (stages, replicas)):
            return cls.for_world(processes, stages, replicas)
        needed = (stages or 1) * (replicas or 1)
        if processes < needed:
            raise ConfigurationError(
                f"stages={stages}, replicas={replicas} needs at least {needed} processes, and there are {processes}. Start more, or"
                + (" leave replicas out: then there are as many as there are processes for." if replicas else " use fewer stages.")
            )
        return cls(stages or processes // needed, replicas or processes // needed)

    @property
    def size(self) -> int:
        return self.stages * self.replicas

    @property
    def workers(self) -> tuple[Worker, ...]:
        """All workers, in the order of their ranks."""
        return tuple(self.worker(rank) for rank in range(self.size))

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """All verified streams: the activations of every cut, then the gradients of every cut."""
        return tuple(Boundary(index, direction) for direction in Direction for index in range(self.stages - 1))

    def before(self, boundary: Boundary) -> Boundary | None:
        """The boundary across which the senders of ``boundary`` received their input; ``None`` at the ends of the pipeline.

        Example:
            >>> Mesh(stages=3, replicas=1).before(Boundary(1, Direction.ACTIVATION)).name
            'stage0/activation'
        """
        index = boundary.index + (1 if boundary.direction is Direction.GRADIENT else -1)
        return Boundary(index, boundary.direction) if 0 <= index < self.stages - 1 else None

    def after(self, boundary: Boundary) -> Boundary | None:
        """The boundary across which the receivers of ``boundary`` send their output; ``None`` at the ends of the pipeline.

        Example:
            >>> Mesh(stages=3, replicas=1).after(Boundary(0, Direction.ACTIVATION)).name
            'stage1/activation'
        """
        index = boundary.index - (1 if boundary.direction is Direction.GRADIENT else -1)
        return Boundary(index, boundary.direction) if 0 <= index < self.stages - 1 else None

    def rank(self, worker: Worker) -> int:
        """The rank that serves ``worker``. Raises ``ConfigurationError`` if the mesh has no such worker."""
        if worker not in self:
            raise ConfigurationError(
                f"{worker} is not in the mesh: it has stages 0..{self.stages - 1} and replicas 0..{self.replicas - 1}."
            )
        return self.stage_ranks(worker.stage)[worker.replica]

    def worker(self, rank: int) -> Worker:
        """The worker that ``rank`` serves."""
        behind, replica = divmod(rank, self.replicas)
        return Worker(self.stages - 1 - behind, replica)

    @property
    def by_stage(self) -> list[Worker]:
        """All workers, in the order of their stages."""
        return [worker for stage in range(self.stages) for worker in self.of_stage(stage)]

    def of_stage(self, stage: int) -> list[Worker]:
        """The workers of a stage."""
        return [Worker(stage, replica) for replica in range(self.replicas)]

    def stage_ranks(self, stage: int) -> range:
        """The ranks of all replicas of ``stage``, which hold the same weights."""
        first = (self.stages - 1 - stage) * self.replicas
        return range(first, first + self.replicas)

    def pipeline_ranks(self, replica: int) -> range:
        """The ranks of one pipeline, from the first stage to the last."""
        return range(replica, self.size, self.replicas)[::-1]

    def __contains__(self, worker: Worker) -> bool:
        return 0 <= worker.stage < self.stages and 0 <= worker.replica < self.replicas

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers)
