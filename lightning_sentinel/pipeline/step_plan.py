"""Everything that ranks decide before a step, in one value that all of them make for themselves.

A decision that changes what ranks do next is a field of :class:`StepPlan`: what runs a step is handed the plan, keeps no copy of
it and asks nobody else. A digest of the plan travels with the step's collective, so that ranks which disagree find out at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["TRAINING", "StepPlan", "plan_step"]

TRAINING = "training_step"

_STEPS_A_TURN = 16
"""For how long a worker serves when there are more workers than lanes: long enough to be a suspect in consecutive steps."""
_DIGEST_BYTES = 3
"""As many as a float32 of the step's collective holds exactly."""


@dataclass(frozen=True)
class StepPlan:
    """One step of a run, as all ranks know it beforehand.

    Args:
        kind: name of the user's step function: ``"training_step"``, ``"validation_step"``, ``"test_step"`` or ``"predict_step"``.
        loader: number of the data loader in an evaluation with several; ``None`` if there is one.
        number: training batches before this one.
        run: runs of a schedule before this one since the engine was made, of any kind, repeated ones included. It is on every
            message, so that a late one is told from its successor.
        mesh: all workers.
        sizes: samples of every replica's batch and micro-batches.
        wiring: which worker serves which lane, with which micro-batches.
        banned: workers that serve nothing any more.
        absent: workers that serve nothing in this step: those that are banned, and those that were found out in it.
        seed: of the random numbers of forward passes.
        scale: factor of the gradients, for accumulation over batches.
        audited: whether signals may be recomputed, so that they are kept until the step is settled.
    """

    kind: str
    loader: int | None
    number: int
    run: int
    mesh: Mesh
    sizes: BatchSizes
    wiring: Wiring
    banned: frozenset[Worker]
    absent: frozenset[Worker]
    seed: int
    scale: float
    audited: bool

    @property
    def trains(self) -> bool:
        return self.kind == TRAINING

    @property
    def log_key(self) -> str:
        """Steps of the same key log the same names."""
        return self.kind if self.loader is None else f"{self.kind}/{self.loader}"

    @cached_property
    def weights(self) -> Tensor:
        """``(lanes, slots)``, the share of its replica's batch that each micro-batch has."""
        return micro_batch_weights(self.wiring, self.sizes)

    @cached_property
    def working_lanes(self) -> list[int]:
        """The lanes that have any samples to work on."""
        samples, wiring = self.sizes.samples, self.wiring
        return [lane for lane in wiring.lanes if any(samples[part.replica] for part in wiring.work[lane])]

    def seeds(self, micro_batch: MicroBatchId) -> MicroBatchSeeds:
        """The seeds of one micro-batch. No two evaluations draw the same numbers, and none draws those of a training step."""
        number = self.number if self.trains else -1 - self.run
        return MicroBatchSeeds.of(self.seed, number, micro_batch, self.mesh.replicas)

    @cached_property
    def digest(self) -> int:
        """24 bits that differ where two plans differ, but for one case in sixteen million."""
        said = (
            *(self.kind, self.loader, self.number, self.run, self.mesh, tuple(self.sizes), self.wiring),
            *(sorted(self.banned), sorted(self.absent), self.seed, self.scale, self.audited),
        )
        return int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=_DIGEST_BYTES).digest(), "big")


def plan_step(
    kind: str,
    mesh: Mesh,
    sizes: BatchSizes,
    *,
    loader: int | None = None,
    number: int = 0,
    run: int = 0,
    banned: Collection[Worker] = (),
    excluded: Collection[Worker] = (),
    shuffled: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
    audited: bool = False,
) -> StepPlan:
    """Decide who does what in a step, from what all ranks hold.

    Args:
        kind: name of the user's step function.
        mesh: all workers.
        sizes: samples of every replica's batch.
        loader: as in :class:`StepPlan`, like all others that are not named here.
        number: see there.
        run: see there.
        banned: see there.
        excluded: workers that were found out in this very step, which is done again without them.
        shuffled: seed by which workers are dealt to lanes while somebody is a suspect; ``None`` if nobody is.
        seed: see there.
        scale: see there.
        audited: see there.

    Example:
        >>> plan = plan_step("training_step", Mesh(2, 3), BatchSizes(2, (4, 4, 4)), number=7, banned={Worker(0, 1)})
        >>> plan.wiring.lanes, plan.weights.tolist()[0]
        ([0, 2], [0.5, 0.5, 0.5])
    """
    absent = frozenset(banned) | frozenset(excluded)
    return StepPlan(
        kind=kind,
        loader=loader,
        number=number,
        run=run,
        mesh=mesh,
        sizes=sizes,
        wiring=Wiring.of(mesh, absent, sizes.micro_batches, number // _STEPS_A_TURN if kind == TRAINING else 0, shuffled),
        banned=frozenset(banned),
        absent=absent,
        seed=seed,
        scale=scale,
        audited=audited,
    )


def micro_batch_weights(wiring: Wiring, sizes: BatchSizes) -> Tensor:
    """``(lanes, slots)``, the share of its replica's batch that each micro-batch has.

    Example:
        >>> micro_batch_weights(Wiring.of(Mesh(2, 2), micro_batches=2), BatchSizes(2, (4, 3)))
        tensor([[0.5000, 0.5000],
                [0.6667, 0.3333]])
    """
    shares = [[sizes.work(replica, part)[1] for part in range(sizes.micro_batches)] for replica in range(len(sizes.samples))]
    return wiring.arrange(torch.tensor(shares))
