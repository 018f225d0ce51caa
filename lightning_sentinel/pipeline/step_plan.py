"""The step plan: all decisions that ranks make before a step, in one value that each rank computes for itself.

:class:`StepPlanner` makes it from values that are the same on all ranks: the ledger, the batch sizes, the number of past steps.

A decision that changes what ranks do next is a field of :class:`StepPlan`. Code that runs a step is handed the plan, keeps no copy
of a decision, and gets it nowhere else. A digest of the plan goes with the step's collective, so that ranks notice at once if they
disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Protocol

from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.randomness import MicroBatchSeeds
from lightning_sentinel.trust.statements import Moment
from lightning_sentinel.verification.ledger import Ledger
from lightning_sentinel.wiring import MicroBatchId, Wiring

__all__ = ["TRAINING", "BanSource", "StepPlan", "StepPlanner", "plan_step"]

TRAINING = "training_step"

_STEPS_A_TURN = 16
"""How many steps a worker serves in turn if a stage has more workers than lanes: enough to be a suspect in consecutive steps."""
_DIGEST_BYTES = 3
"""The most bytes whose value a float32 of the step's collective holds exactly."""


@dataclass(frozen=True)
class StepPlan:
    """One step of a run, as all ranks plan it beforehand.

    Args:
        kind: name of the user's step function: ``"training_step"``, ``"validation_step"``, ``"test_step"`` or ``"predict_step"``.
        loader: number of the data loader in an evaluation with several; ``None`` if there is one.
        number: training batches before this one.
        run: schedule runs since the engine was made, of any kind, repeated ones and this one included. Every message carries it,
            so that a late message is told from its successor.
        mesh: all workers.
        sizes: samples of every replica's batch and micro-batches.
        wiring: which worker serves which lane, with which micro-batches.
        banned: workers that serve no lane any more.
        absent: workers that serve no lane in this step: banned workers, and those found lying in an earlier run of this step.
        seed: the seed of forward passes' random numbers.
        scale: factor of the gradients, for accumulation over batches.
        audited: whether signals may be audited, so that they are kept until the step is settled.
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
        """The key under which the names of logged values are agreed on: steps of one key log the same names."""
        return self.kind if self.loader is None else f"{self.kind}/{self.loader}"

    def moment(self, run: bytes) -> Moment:
        """When what is signed in this step is said.

        Args:
            run: 16 bytes that name the run.
        """
        return Moment(run, self.number, self.run)

    @cached_property
    def weights(self) -> Tensor:
        """``(lanes, slots)``, each micro-batch's fraction of its replica's batch."""
        return micro_batch_weights(self.wiring, self.sizes)

    @cached_property
    def working_lanes(self) -> list[int]:
        """The lanes that have samples to work on."""
        samples = self.sizes.samples
        wiring = self.wiring
        return [lane for lane in wiring.lanes if any(samples[one.replica] for one in wiring.work[lane])]

    def seeds(self, micro_batch: MicroBatchId) -> MicroBatchSeeds:
        """The seeds of one micro-batch. No two evaluations draw the same numbers, and none draws those of a training step."""
        number = self.number if self.trains else -self.run
        return MicroBatchSeeds.of(self.seed, number, micro_batch, self.mesh.replicas)

    @cached_property
    def digest(self) -> int:
        """A 24-bit hash of the plan: two different plans agree in it in one case in sixteen million."""
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
    run: int = 1,
    banned: Collection[Worker] = (),
    excluded: Collection[Worker] = (),
    shuffled: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
    audited: bool = False,
) -> StepPlan:
    """Make the plan of a step, from values that are the same on all ranks.

    Args:
        kind: name of the user's step function.
        mesh: all workers.
        sizes: samples of every replica's batch.
        loader: see :class:`StepPlan`.
        number: see :class:`StepPlan`.
        run: see :class:`StepPlan`.
        banned: see :class:`StepPlan`.
        excluded: workers found lying in an earlier run of this step, which is repeated without them.
        shuffled: the seed that deals workers to lanes while any worker is a suspect; ``None`` if none is.
        seed: see :class:`StepPlan`.
        scale: see :class:`StepPlan`.
        audited: see :class:`StepPlan`.

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
    """``(lanes, slots)``, each micro-batch's fraction of its replica's batch.

    Example:
        >>> micro_batch_weights(Wiring.of(Mesh(2, 2), micro_batches=2), BatchSizes(2, (4, 3)))
        tensor([[0.5000, 0.5000],
                [0.6667, 0.3333]])
    """
    shares = [[sizes.work(replica, number)[1] for number in range(sizes.micro_batches)] for replica in range(len(sizes.samples))]
    return wiring.arrange(torch.tensor(shares))


class BanSource(Protocol):
    """Knows which workers are banned and whether any is a suspect, the same on all ranks."""

    @property
    def ledger(self) -> Ledger:
        """Who is banned."""

    @property
    def audits(self) -> bool:
        """Whether signals may be audited."""

    def lane_seed(self, step: int) -> int | None:
        """The seed by which workers are shuffled among the lanes in a training step; ``None`` leaves them where they are."""


@dataclass
class StepPlanner:
    """Plans the steps of one engine.

    Args:
        mesh: all workers.
        bans: the guard; ``None`` in a plain pipeline.
        runs: schedule runs so far; see :class:`StepPlan`.
    """

    mesh: Mesh
    bans: BanSource | None
    runs: int = 0

    def training(self, number: int, sizes: BatchSizes, scale: float, seed: int, excluded: Collection[Worker] = ()) -> StepPlan:
        """Plan a training step.

        Args:
            number: training batches before this one.
            sizes: samples of every replica's batch.
            scale: factor of the gradients, for accumulation over batches.
            seed: the seed of forward passes' random numbers.
            excluded: workers found lying in an earlier run of this step, which is repeated without them.

        Raises:
            MeshExhaustedError: if no complete pipeline is left.
        """
        bans = self.bans
        plan = plan_step(
            TRAINING,
            self.mesh,
            sizes,
            number=number,
            run=self._next_run(),
            banned=self._banned,
            excluded=excluded,
            shuffled=None if bans is None else bans.lane_seed(number),
            seed=seed,
            scale=scale,
            audited=bans is not None and bans.audits,
        )
        if not any(plan.wiring.live):
            raise MeshExhaustedError(
                f"No complete pipeline is left at step {number}; banned are {', '.join(map(str, sorted(self._banned)))}, by"
                f" Response(banned=...), a ledger or a checkpoint. The run cannot go on with {self.mesh.replicas} replica(s). Use"
                " more replicas, or take some of the bans back."
            )
        return plan

    def evaluation(self, kind: str, loader: int | None, sizes: BatchSizes, seed: int) -> StepPlan:
        """Plan a step without gradients.

        Args:
            kind: name of the user's step function.
            loader: number of the data loader, if there are several.
            sizes: samples of every replica's batch.
            seed: the seed of forward passes' random numbers.
        """
        run = self._next_run()
        return plan_step(kind, self.mesh, sizes, loader=loader, run=run, banned=self._banned, seed=seed)

    @property
    def _banned(self) -> frozenset[Worker]:
        return frozenset() if self.bans is None else self.bans.ledger.banned

    def _next_run(self) -> int:
        self.runs += 1
        return self.runs
