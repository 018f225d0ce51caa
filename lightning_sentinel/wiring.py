"""Which worker serves which pipeline: the mesh as it is once workers are banned.

All replicas of a stage hold the same weights, so any of them can serve any pipeline. A *lane* is a pipeline as the data sees it:
lane ``r`` gets the samples of replica ``r``, whoever works on them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lightning_sentinel.mesh import Mesh, Worker

__all__ = ["Wiring"]


@dataclass(frozen=True)
class Wiring:
    """Who serves which lane.

    Args:
        serving: the replica that serves lane ``l`` at stage ``s`` is ``serving[s][l]``.
        live: whether lane ``l`` is used.
    """

    serving: tuple[tuple[int, ...], ...]
    live: tuple[bool, ...]

    @classmethod
    def fixed(cls, mesh: Mesh, banned: Collection[Worker] = ()) -> Wiring:
        """Every worker in the lane of its own number; a lane with a banned worker is left out.

        Example:
            >>> Wiring.fixed(Mesh(stages=2, replicas=3), {Worker(0, 1)}).live
            (True, False, True)
        """
        lost = {worker.replica for worker in banned}
        lanes = range(mesh.replicas)
        return cls(tuple(tuple(lanes) for _ in range(mesh.stages)), tuple(lane not in lost for lane in lanes))

    @classmethod
    def gathered(cls, mesh: Mesh, banned: Collection[Worker], turn: int = 0) -> Wiring:
        """Banned workers share as few lanes as possible: as many are left out as the stage that was hit hardest has banned workers.

        A stage with fewer banned workers than that has workers to spare, which take turns: who is never verified is never found.

        Args:
            turn: who of those that could be spared serves now.

        Example:
            >>> wiring = Wiring.gathered(Mesh(stages=2, replicas=3), {Worker(0, 1), Worker(1, 2)})
            >>> wiring.live, wiring.serving
            ((True, False, True), ((0, 1, 2), (0, 2, 1)))
        """
        by_stage = [{worker.replica for worker in banned if worker.stage == stage} for stage in range(mesh.stages)]
        lanes = range(mesh.replicas)
        hits = [sum(lane in stage for stage in by_stage) for lane in lanes]
        left_out = set(sorted(lanes, key=lambda lane: (-hits[lane], lane))[: max(map(len, by_stage))])
        return cls(tuple(_row(lanes, left_out, bad, turn) for bad in by_stage), tuple(lane not in left_out for lane in lanes))

    @classmethod
    def taken_over(cls, mesh: Mesh, banned: Collection[Worker], turn: int) -> Wiring:
        """The others of the stage do a banned worker's work besides their own, in turn. No lane is left out while one is left.

        Args:
            turn: the number of the step; who takes over changes with it, so that an undetected liar does not keep a second lane.

        Example:
            >>> mesh, banned = Mesh(stages=1, replicas=3), {Worker(0, 1)}
            >>> Wiring.taken_over(mesh, banned, turn=0).serving, Wiring.taken_over(mesh, banned, turn=1).serving
            (((0, 0, 2),), ((0, 2, 2),))
        """
        serving, possible = [], True
        for stage in range(mesh.stages):
            fit = [lane for lane in range(mesh.replicas) if Worker(stage, lane) not in banned]
            possible = possible and bool(fit)
            helpers = iter(range(turn, turn + mesh.replicas))
            serving.append(
                tuple(lane if lane in fit or not fit else fit[next(helpers) % len(fit)] for lane in range(mesh.replicas))
            )
        return cls(tuple(serving), (possible,) * mesh.replicas)

    def worker(self, stage: int, lane: int) -> Worker:
        """Who serves ``lane`` at ``stage``."""
        return Worker(stage, self.serving[stage][lane])


def _row(lanes: range, left_out: set[int], banned: set[int], turn: int) -> tuple[int, ...]:
    """Who serves which lane at one stage: nobody banned a lane that is used, everybody else its own lane where possible."""
    fit = [lane for lane in lanes if lane not in banned]
    needed = len(lanes) - len(left_out)
    # Those who pause this turn: of the workers that are fit, from another place on each turn; at first those of the lost lanes.
    preferred = sorted(fit, key=lambda worker: (worker in left_out, worker))
    start = turn * (len(fit) - needed) % len(fit) if fit else 0
    serving = (preferred[start:] + preferred[:start])[:needed]
    row = {lane: lane for lane in lanes if lane in serving and lane not in left_out}
    rest = iter([worker for worker in serving if worker not in row])
    row |= {lane: next(rest) for lane in lanes if lane not in left_out and lane not in row}
    idle = iter([worker for worker in lanes if worker not in row.values()])
    return tuple(row[lane] if lane in row else next(idle) for lane in lanes)
