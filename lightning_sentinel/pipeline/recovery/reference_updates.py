"""Updates a stage's references once a step, from the sum of its replicas' contributions, if that sum is plausible.

A sum does not tell which replica spoiled it, so it is checked before the references learn from it. Where it is not finite, or much
further from the references than of late, they do not learn from it, and an all-gather collects each replica's contribution. A
replica whose contribution is not finite is blamed by name, and its contribution dropped. A contribution that is much further away
than most is brought closer. The rest is learned with the next step: the host does not wait for the device in between, because the
result of the check has reached it by then.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.waiting import on_its_way
from lightning_sentinel.verification.medians import median
from lightning_sentinel.verification.references import Contribution, References

__all__ = ["Apart", "ReferenceUpdates"]

Apart = Callable[[Tensor], tuple[Tensor, list[Worker]]]
"""Gathers a vector from the replicas of a stage: ``(workers, len(vector))``, and the workers in that order."""

_SURPRISING = 4.0
"""How many times its recent distance from the references a sum may have before each replica's contribution is looked at."""
_FURTHER_THAN_MOST = 4.0
_BETA = 0.9
_TINY = 1e-30


class _Added(NamedTuple):
    """What this process contributed to the previous step's sum.

    Args:
        vector: the contributions to all boundaries, concatenated.
        lengths: the length of each boundary's part.
        expected: 0-dim bool on the host, whether the references learned the sum as it was. The copy to the host may be incomplete
            until the next step's collective has waited for the device.
    """

    vector: Tensor
    lengths: list[int]
    expected: Tensor


class ReferenceUpdates:
    """Checks each step's sums by their distance from the references, which it remembers.

    Attributes:
        refused: how often each worker of this stage contributed non-finite values.
    """

    def __init__(self) -> None:
        self.refused: Counter[Worker] = Counter()
        self._distance: Tensor | None = None
        self._added: _Added | None = None

    def of_step(
        self,
        mine: Sequence[Contribution],
        references: Sequence[References],
        sizes: Sequence[Mapping[str, int]],
        sum_over_replicas: Callable[[Tensor], Tensor],
        apart: Apart | None,
    ) -> list[Contribution]:
        """The contributions to learn, one for each boundary; to be called once a step, after the step's collective.

        Args:
            mine: this process's contributions, one for each boundary.
            references: what was learned so far.
            sizes: names of the statistics, and how many floats each has.
            sum_over_replicas: adds a vector over the replicas of this stage.
            apart: gathers a vector from these replicas; ``None`` if all of them are in this process.
        """
        if not mine:
            return []
        vector = torch.cat([contribution.flat() for contribution in mine])
        lengths = [len(contribution.flat()) for contribution in mine]

        def parts(flat: Tensor) -> list[Contribution]:
            return [Contribution.from_flat(part, like) for part, like in zip(flat.split(lengths), mine)]

        before = self._of_the_step_before(lengths, parts, references, sizes, apart)
        flat = sum_over_replicas(vector.clone())
        distance = self._distances(parts(flat), references, sizes)
        usual = self._distance if self._distance is not None and len(self._distance) == len(distance) else distance
        expected = flat.isfinite().all() & distance.isfinite().all()
        if apart is not None:
            expected = expected & (distance <= _SURPRISING * usual + _TINY).all()
            # All ranks of the stage have the same sum, so all of them will call `apart`, or none.
            self._added = _Added(vector, lengths, on_its_way(expected))
        self._distance = torch.where(usual.isfinite(), torch.lerp(distance, usual, _BETA), distance)
        learned = parts(torch.where(expected, flat, 0.0))
        return learned if before is None else [Contribution.added(both) for both in zip(learned, before)]

    @staticmethod
    def _distances(step: Sequence[Contribution], references: Sequence[References], sizes: Sequence[Mapping[str, int]]) -> Tensor:
        each = (known.distances(one, size) for known, one, size in zip(references, step, sizes))
        return torch.stack([torch.stack(of_one).sum() for of_one in each])

    def _of_the_step_before(
        self,
        lengths: Sequence[int],
        parts: Callable[[Tensor], list[Contribution]],
        references: Sequence[References],
        sizes: Sequence[Mapping[str, int]],
        apart: Apart | None,
    ) -> list[Contribution] | None:
        """What remains to be learned of the previous step; ``None`` if its sum was learned at once."""
        added = self._added
        self._added = None
        if added is None or apart is None or bool(added.expected):
            return None
        rows, workers = apart(added.vector)
        # Contributions from signals of another length cannot be added to the current ones.
        return self._together(rows, workers, parts, references, sizes) if list(lengths) == added.lengths else None

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
            # Nor may a worker's contribution count as more than a few times as many signals as most have.
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
