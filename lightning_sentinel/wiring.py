"""Wiring: which workers serve which pipeline with which micro-batches, also once workers are banned.

All replicas of a stage hold the same weights, so any of them can serve any pipeline. A *lane* is a pipeline: one worker of each
stage. While no worker is banned lane ``r`` is replica ``r`` and works on the samples that are dealt to it. Banned workers are
gathered in as few lanes as possible; these lanes are left out, and their micro-batches are dealt to the others. So the batch stays
the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.seeds import derive_seed

__all__ = ["MicroBatchId", "Wiring"]


class MicroBatchId(NamedTuple):
    """One micro-batch of a step: the replica to which its samples were dealt, and its number there."""

    replica: int
    micro_batch: int


@dataclass(frozen=True)
class Wiring:
    """Which workers serve which lane, and with which micro-batches.

    Args:
        serving: the replica that serves lane ``l`` at stage ``s`` is ``serving[s][l]``.
        live: whether lane ``l`` is used.
        work: the micro-batches of lane ``l``, in order; ``work[l][k]`` is in its *slot* ``k``. In a lane that is left out:
            micro-batches that no worker can compute.
    """

    serving: tuple[tuple[int, ...], ...]
    live: tuple[bool, ...]
    work: tuple[tuple[MicroBatchId, ...], ...]

    @classmethod
    def of(
        cls, mesh: Mesh, banned: Collection[Worker] = (), micro_batches: int = 1, turn: int = 0, shuffled: int | None = None
    ) -> Wiring:
        """Leave out as many lanes as the stage that was hit hardest has banned workers, and deal their micro-batches to the others.

        A stage with fewer banned workers than that has workers to spare, which take turns: a worker that is never verified is never
        found out. The samples of a replica of which every worker is banned are lost, because no other replica has them.

        Args:
            banned: workers that serve no live lane.
            micro_batches: of each replica's batch.
            turn: number that rotates which workers are spared.
            shuffled: seed by which the workers of each stage are dealt to the lanes, but for those of the last stage, where steps
                run; ``None``: each serves its own lane where it can.

        Example:
            >>> wiring = Wiring.of(Mesh(stages=2, replicas=3), {Worker(0, 1), Worker(1, 2)}, micro_batches=2)
            >>> wiring.live, wiring.serving
            ((True, False, True), ((0, 1, 2), (0, 2, 1)))
            >>> [tuple(micro_batch_id) for micro_batch_id in wiring.work[2]]
            [(2, 0), (2, 1), (1, 1)]
        """
        by_stage = [{worker.replica for worker in banned if worker.stage == stage} for stage in range(mesh.stages)]
        lanes = range(mesh.replicas)
        hits = [sum(lane in stage for stage in by_stage) for lane in lanes]
        left_out = set(sorted(lanes, key=lambda lane: (-hits[lane], lane))[: max(map(len, by_stage))])
        left = [lane for lane in lanes if lane not in left_out]
        orphaned = {lane for lane in left_out if left and hits[lane] < mesh.stages}
        numbers = range(micro_batches)
        work = [[MicroBatchId(lane, number) for number in numbers if lane not in orphaned] for lane in lanes]
        # By number first: micro-batches of the same number are of the same size, and stay side by side.
        for index, micro_batch_id in enumerate(MicroBatchId(lane, number) for number in numbers for lane in sorted(orphaned)):
            work[left[index % len(left)]].append(micro_batch_id)
        serving = [_row(lanes, left_out, bad, turn) for bad in by_stage]
        if shuffled is not None:
            serving[:-1] = [_shuffled(row, left, derive_seed(shuffled, stage)) for stage, row in enumerate(serving[:-1])]
        return cls(
            serving=tuple(serving),
            live=tuple(lane not in left_out for lane in lanes),
            work=tuple(map(tuple, work)),
        )

    @property
    def lanes(self) -> list[int]:
        """The lanes that are used."""
        return [lane for lane, live in enumerate(self.live) if live]

    @property
    def slots(self) -> int:
        """Number of micro-batches of the lane that has most."""
        return max(map(len, self.work))

    @cached_property
    def places(self) -> dict[MicroBatchId, tuple[int, int]]:
        """The lane and the slot of each micro-batch."""
        return {micro_batch_id: (lane, slot) for lane, ids in enumerate(self.work) for slot, micro_batch_id in enumerate(ids)}

    def worker(self, stage: int, lane: int) -> Worker:
        """The worker that serves ``lane`` at ``stage``."""
        return Worker(stage, self.serving[stage][lane])

    def lane(self, worker: Worker) -> int | None:
        """The lane that a worker serves; ``None`` if it serves none."""
        lane = self.serving[worker.stage].index(worker.replica)
        return lane if self.live[lane] else None

    def sent_by(self, workers: Collection[Worker], mesh: Mesh) -> Tensor:
        """``(boundaries, lanes)`` bool, whether one of these workers sends the signals of a lane across a boundary."""
        lanes = range(mesh.replicas)
        return torch.tensor([[self.worker(boundary.sender, lane) in workers for lane in lanes] for boundary in mesh.boundaries])

    def arrange(self, values: Tensor) -> Tensor:
        """Rearrange values of micro-batches from replicas to lanes; zero in a lane's empty slots.

        Args:
            values: ``(..., replicas, micro_batches)``.

        Returns:
            ``(..., lanes, slots)``.

        Example:
            >>> wiring = Wiring.of(Mesh(stages=2, replicas=3), {Worker(0, 1)}, micro_batches=2)
            >>> wiring.arrange(torch.tensor([[1, 2], [3, 4], [5, 6]]))
            tensor([[1, 2, 3],
                    [0, 0, 0],
                    [5, 6, 4]])
        """
        arranged = values.new_zeros(*values.shape[:-2], len(self.work), self.slots)
        ids = [(*micro_batch_id, *place) for micro_batch_id, place in self.places.items()]
        replicas, numbers, lanes, slots = torch.tensor(ids).T
        arranged[..., lanes, slots] = values[..., replicas, numbers]
        return arranged


def _row(lanes: range, left_out: set[int], banned: set[int], turn: int) -> tuple[int, ...]:
    """The replica that serves each lane at one stage: no banned one in a live lane, others in their own lane where possible."""
    fit = [lane for lane in lanes if lane not in banned]
    needed = len(lanes) - len(left_out)
    # Which fit workers pause rotates with the turn; at first those of the lanes that are left out.
    preferred = sorted(fit, key=lambda worker: (worker in left_out, worker))
    start = turn * (len(fit) - needed) % len(fit) if fit else 0
    serving = (preferred[start:] + preferred[:start])[:needed]
    row = {lane: lane for lane in lanes if lane in serving and lane not in left_out}
    rest = iter([worker for worker in serving if worker not in row])
    row |= {lane: next(rest) for lane in lanes if lane not in left_out and lane not in row}
    idle = iter([worker for worker in lanes if worker not in row.values()])
    return tuple(row[lane] if lane in row else next(idle) for lane in lanes)


def _shuffled(row: tuple[int, ...], lanes: list[int], seed: int) -> tuple[int, ...]:
    """The row with the workers of these lanes in a drawn order."""
    workers = Random(seed).sample([row[lane] for lane in lanes], len(lanes))
    served = dict(zip(lanes, workers))
    return tuple(served.get(lane, worker) for lane, worker in enumerate(row))
