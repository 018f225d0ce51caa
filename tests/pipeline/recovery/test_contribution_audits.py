from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.contribution_audits import ContributionAudits, StageRecomputation
from lightning_sentinel.pipeline.recovery.examination import Inputs
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.verification.jury import ContributionCase, Jury
from lightning_sentinel.verification.majority import Judgement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.sketches import SKETCHED, GradientSketch
from lightning_sentinel.wiring import MicroBatchId
from tests.pipeline.ranks import ranks
from tests.pipeline.recovery.toys import SAMPLES, Toy, credentials

A, G = Direction.ACTIVATION, Direction.GRADIENT


class Contributing(Toy):
    """A toy mesh with what each worker adds to the gradient of its stage's matrix: inputs times gradients of the outputs."""

    def gradient_of(self, stage: int, part: MicroBatchId, given: Inputs) -> Tensor:
        inputs = given.batch[0] if stage == 0 else given.activation
        gradient = given.gradient
        if stage == self.mesh.stages - 1:
            gradient = 0.5 * (inputs @ self.weights[stage] - given.batch[1])
        assert gradient is not None
        return inputs.T @ gradient

    def sketches(self, lies: dict[Worker, Callable[[Tensor], Tensor]]) -> Tensor:
        """The table of the step, computed from what each worker itself has received."""
        table = torch.zeros(self.mesh.stages, self.mesh.replicas, SKETCHED)
        for stage in range(self.mesh.stages):
            for lane in self.wiring.lanes:
                worker, kept, total = self.wiring.worker(stage, lane), self.of(stage, lane).received, torch.zeros(())
                for slot, part in enumerate(self.wiring.work[lane]):
                    given = Inputs(list(self.batches[part]), kept.get((A, slot)), kept.get((G, slot)))
                    total = total + self.gradient_of(stage, part, given)
                added = lies[worker](total) if worker in lies else total
                table[stage, worker.replica] = GradientSketch(stage)([added])
        return table

    def heard(
        self, lies: dict[Worker, Callable[[Tensor], Tensor]] | None = None, audited: Sequence[Worker] | None = None
    ) -> dict[Worker, Judgement]:
        """What all ranks decide of the contributions that an auditor says do not match, by default of all that are audited."""
        plan = plan_step("training_step", self.mesh, BatchSizes(2, (2 * SAMPLES,) * self.mesh.replicas), number=3)
        plan = replace(plan, wiring=self.wiring, banned=frozenset(self.banned), absent=frozenset(self.banned))
        table = self.table = self.sketches(lies or {})
        workers = [self.wiring.worker(stage, lane) for lane in self.wiring.lanes for stage in range(self.mesh.stages)]
        cases = [ContributionCase(lane, worker) for worker in audited or workers if (lane := self.wiring.lane(worker)) is not None]

        def work(rank: int) -> dict[Worker, Judgement]:
            worker = self.mesh.worker(rank)

            def samples(part: MicroBatchId) -> Any:
                return [list(self.batches[part]), SAMPLES, 0.5] if self.handed is None else self.handed

            recomputed = StageRecomputation(
                samples,
                lambda part, given: [self.gradient_of(worker.stage, part, given)],
                GradientSketch(worker.stage),
                lambda: torch.float32,
            )
            transcript = Transcript(self.mesh, credentials(self.mesh, worker, self.signs))
            audits = ContributionAudits(self.mesh, worker, self.kept[rank], recomputed, transcript)
            audits.begin(self.adversary)
            ask = partial(audits.ask, plan=plan, sketches=table, commitments=self.commitments)
            found = Jury(self.mesh).hear_contributions(dict.fromkeys(cases), self.banned, (), 3, ask)
            self.on_weights = audits.testimonies
            return {case.audited: judgement for case, judgement in found.items()}

        with ranks(self.mesh.size) as world:
            first, *rest = world.run(work)
        assert all(first == other for other in rest), "all ranks take part, and know the same"
        return first


def contributing(stages: int = 3, replicas: int = 3, banned: Sequence[Worker] = (), signs: bool = True) -> Contributing:
    toy = Contributing(Mesh(stages, replicas), banned=banned, signs=signs)
    toy.handed = None
    return toy


@pytest.mark.parametrize("banned", [[], [Worker(1, 0)]])
def test_who_adds_something_else_is_found_in_every_stage_and_nobody_else(banned: list[Worker]) -> None:
    toy = contributing(replicas=4, banned=banned)
    lies = {Worker(0, 1): torch.neg, Worker(1, 2): lambda one: one + 0.01 * one.norm(), Worker(2, 3): lambda one: one * torch.nan}
    assert {worker: judgement.outcome for worker, judgement in toy.heard(lies).items()} == dict.fromkeys(lies, Outcome.LIED)


def test_rounding_is_no_lie() -> None:
    assert contributing().heard({Worker(1, 1): lambda one: one * (1 + 1e-5)}) == {}


@pytest.mark.parametrize(("neighbour", "outcome"), [(0, Outcome.ACTIVATION_WITHHELD), (2, Outcome.GRADIENT_WITHHELD)])
def test_a_neighbour_that_hands_over_another_signal_than_it_had_sent_is_told_from_a_liar(neighbour: int, outcome: Outcome) -> None:
    toy = contributing()
    direction = A if neighbour == 0 else G
    toy.of(neighbour, 1).sent[direction, 1] = torch.zeros(SAMPLES, 4)
    assert toy.heard(audited=[Worker(1, 1)])[Worker(1, 1)].outcome == outcome


def test_samples_on_which_no_step_can_work_blame_nobody() -> None:
    toy = contributing()
    toy.handed = [["nonsense"], SAMPLES, 0.5]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert toy.heard({Worker(0, 0): torch.neg}, audited=[Worker(0, 0)]) == {}
    assert any("could not be audited with the samples" in str(one.message) for one in said)


def test_an_auditor_that_lies_is_outvoted() -> None:
    toy = contributing(replicas=5)
    first = Jury(toy.mesh).others(Worker(1, 0), (), 3, 1, 0)[0]
    toy.adversary = Adversary("false_votes", toy.mesh, workers=[first])
    found = toy.heard(audited=[Worker(1, 0)])[Worker(1, 0)]
    assert found.outcome == Outcome.MATCHES and found.outvoted == {first}


def test_of_two_nobody_can_tell_who_lies() -> None:
    toy = contributing(stages=2, replicas=2)
    assert toy.heard({Worker(1, 0): torch.neg})[Worker(1, 0)].outcome == Outcome.DISPUTED
