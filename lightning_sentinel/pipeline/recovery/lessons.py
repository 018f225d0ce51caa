"""What a stage learns from a step: the sum of what its replicas have to say, as long as it can be believed.

A sum does not tell who spoiled it. So it is looked at before anything learns from it: where it is not finite, or further from what
was learned so far than it has been of late, replicas say once more what they add, each by itself. Who adds what is not finite
answers for it by name and adds nothing; who is much further away than most is brought as close as they are.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.references import Contribution, References

__all__ = ["Apart", "Lessons"]

Apart = Callable[[Tensor], tuple[Tensor, list[Worker]]]
"""Gathers a vector from the replicas of a stage: ``(workers, len(vector))``, and who they are."""

_SURPRISING = 4.0
"""How much further than of late a sum may be from what is known, before it is asked who made it so."""
_FURTHER_THAN_MOST = 4.0
_BETA = 0.9
_TINY = 1e-30


class Lessons:
    """Remembers how far sums were from what had been learned.

    Attributes:
        refused: how often each worker of this stage added what is not finite.
    """

    def __init__(self) -> None:
        self.refused: Counter[Worker] = Counter()
        self._distance: Tensor | None = None

    def of_step(
        self,
        mine: Sequence[Contribution],
        references: Sequence[References],
        sizes: Sequence[Mapping[str, int]],
        sum_over_replicas: Callable[[Tensor], Tensor],
        apart: Apart | None,
    ) -> list[Contribution | None]:
        """What to learn of each boundary; ``None`` for nothing.

        Args:
            mine: what this process has to say.
            references: what was learned so far.
            sizes: names of the statistics, and how many floats each has.
            sum_over_replicas: adds a vector over the replicas of this stage.
            apart: gathers it from them; ``None`` where all of them are in this process.
        """
        if not mine:
            return []
        vector = torch.cat([contribution.flat() for contribution in mine])
        lengths = [len(contribution.flat()) for contribution in mine]

        def parts(flat: Tensor) -> list[Contribution]:
            return [Contribution.from_flat(part, like) for part, like in zip(flat.split(lengths), mine)]

        def distances(step: Sequence[Contribution]) -> Tensor:
            each = (known.distances(one, size) for known, one, size in zip(references, step, sizes))
            return torch.stack([torch.stack(of_one).sum() for of_one in each])

        flat = sum_over_replicas(vector.clone())
        total = parts(flat)
        distance = distances(total)
        usual = self._distance if self._distance is not None and len(self._distance) == len(distance) else distance
        expected = (distance <= _SURPRISING * usual + _TINY).all() & flat.isfinite().all() & distance.isfinite().all()
        # All ranks of the stage have the same sum, so all of them ask or none does.
        if not bool(expected):
            if apart is not None:
                total = self._together(*apart(vector), parts, references, sizes)
                distance = distances(total)
            elif not bool(flat.isfinite().all()):
                return [None] * len(mine)
        self._distance = torch.where(usual.isfinite(), torch.lerp(distance, usual, _BETA), distance)
        return list(total)

    def _together(
        self,
        rows: Tensor,
        workers: Sequence[Worker],
        parts: Callable[[Tensor], list[Contribution]],
        references: Sequence[References],
        sizes: Sequence[Mapping[str, int]],
    ) -> list[Contribution]:
        finite = rows.isfinite().all(dim=1)
        for worker, fine in zip(workers, finite.tolist()):
            if not fine:
                self._blame(worker)
        kept = [parts(row) for row, fine in zip(rows, finite.tolist()) if fine]
        if not kept:
            return parts(torch.zeros_like(rows[0]))
        result = []
        for index, (known, size) in enumerate(zip(references, sizes)):
            said = [of_worker[index] for of_worker in kept]
            distances = torch.stack([torch.stack(known.distances(one, size)) for one in said])
            spoke = torch.stack([one.signals > 0 for one in said])[:, None]
            limit = _FURTHER_THAN_MOST * median(torch.where(spoke, distances, torch.nan), dim=0)
            shares = (limit / distances.clamp(min=_TINY)).nan_to_num(1.0).clamp(max=1.0)
            # Nor has anybody more to say than a few times what most have.
            signals = torch.stack([one.signals for one in said])[:, None]
            most = _FURTHER_THAN_MOST * median(torch.where(spoke, signals, torch.nan), dim=0).nan_to_num(0.0)
            result.append(Contribution.added([known.nearer(one, share, most, size) for one, share in zip(said, shares)]))
        return result

    def _blame(self, worker: Worker) -> None:
        if not self.refused[worker]:
            warnings.warn(
                f"{worker} added values that are not finite to what its stage learns of honest signals. They were left out, and so"
                " is what it adds from now on whenever it does so again: look at its machine, or ban it.",
                stacklevel=2,
            )
        self.refused[worker] += 1
