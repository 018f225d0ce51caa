from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.contribution_checks import ContributionChecks, Contributions, weights_of_workers
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.jury import ContributionCase
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.sketches import SKETCHED
from tests.verification.steps import Step

MESH = Mesh(3, 4)
SIZES = BatchSizes(2, (4, 4, 4, 4))
NOTHING = Step(MESH.stages, MESH.replicas).judge()


class Stage:
    """Workers that recompute contributions, and who of them lies."""

    def __init__(self, liars: Sequence[Worker] = ()) -> None:
        self.liars, self.asked = set(liars), list[Worker]()

    def __call__(self, asked: Sequence[tuple[ContributionCase, Worker]]) -> list[Outcome]:
        self.asked += [case.audited for case, _ in asked]
        return [Outcome.LIED if case.audited in self.liars else Outcome.MATCHES for case, _ in asked]


def checks(rate: float | None = 0.25, **settings: object) -> ContributionChecks:
    return ContributionChecks(MESH, Verification(seed=1), Response(gradient_audit_rate=rate, **settings))  # type: ignore[arg-type]


def test_workers_are_drawn_at_the_rate_and_those_without_a_lane_never() -> None:
    stage, steps, absent = Stage(), 400, Worker(1, 2)
    some = checks()
    for number in range(steps):
        plan = plan_step("training_step", MESH, SIZES, number=number, banned={absent})
        some.judged(NOTHING, Contributions(None, stage), plan, Ledger())
    assert absent not in stage.asked
    assert len(stage.asked) / (steps * MESH.stages * (MESH.replicas - 1)) == pytest.approx(0.25, abs=0.02)


def test_a_liar_is_found_and_its_step_is_not_learned() -> None:
    liar, plan = Worker(1, 2), plan_step("training_step", MESH, SIZES)
    some, sketches = checks(rate=1.0), torch.ones(MESH.stages, MESH.replicas, SKETCHED)
    verdict = some.judged(NOTHING, Contributions(sketches, Stage([liar])), plan, Ledger())
    assert verdict.guilty == {liar} and verdict.audits == len(MESH.workers)
    assert int(some.state_dict()["steps"]) == 0
    assert not some.judged(NOTHING, Contributions(sketches, Stage()), plan, Ledger()).guilty
    assert int(some.state_dict()["steps"]) == 1


def test_a_run_that_only_reports_goes_on_learning_from_the_others() -> None:
    plan, some = plan_step("training_step", MESH, SIZES), checks(rate=1.0, on_flag="log", ban_after=None)
    claims = Contributions(torch.ones(MESH.stages, MESH.replicas, SKETCHED), Stage([Worker(1, 2)]))
    assert some.judged(NOTHING, claims, plan, Ledger()).guilty == {Worker(1, 2)}
    assert int(some.state_dict()["steps"]) == 1


def test_behind_a_false_signal_no_contribution_is_looked_at() -> None:
    stage, plan = Stage(), plan_step("training_step", MESH, SIZES)
    liar = replace(NOTHING, guilty=frozenset({Worker(0, 1)}))
    assert checks(rate=1.0).judged(liar, Contributions(None, stage), plan, Ledger()) is liar and not stage.asked


@pytest.mark.parametrize("settings", [{"rate": None}, {"audit_rate": None}])
def test_it_can_be_turned_off(settings: dict[str, None]) -> None:
    assert not checks(**settings).audits and checks(**settings).state_dict() == {}
    assert checks().audits


def test_weights_are_those_of_the_work_of_each_lane() -> None:
    plan = plan_step("training_step", MESH, BatchSizes(2, (4, 4, 0, 4)), banned={Worker(1, 0)})
    weights = weights_of_workers(plan)
    # Whose own lane is left out rests, or serves that of the worker that is banned; the work of its lane is dealt to others.
    assert weights.sum(dim=1).tolist() == [3.0, 3.0, 3.0]
    assert float(weights[1, 0]) == 0
