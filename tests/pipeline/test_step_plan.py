from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan, StepPlanner, plan_step
from lightning_sentinel.verification import Ledger
from lightning_sentinel.wiring import MicroBatchId, Wiring

MESH, SIZES = Mesh(3, 4), BatchSizes(2, (4, 4, 4, 3))
PLAN = plan_step("training_step", MESH, SIZES, number=7, banned={Worker(0, 1)}, seed=3, scale=0.5, audited=True)
OTHERS: dict[str, Any] = {
    "kind": "validation_step",
    "loader": 1,
    "number": 8,
    "run": 2,
    "mesh": Mesh(4, 3),
    "sizes": BatchSizes(2, (4, 4, 4, 2)),
    "wiring": Wiring.of(MESH, (), 2),
    "banned": frozenset(),
    "absent": frozenset({Worker(0, 1), Worker(1, 1)}),
    "seed": 4,
    "scale": 1.0,
    "audited": False,
}


def test_a_digest_is_the_same_for_the_same_plan_and_differs_with_every_field() -> None:
    again = plan_step("training_step", MESH, SIZES, number=7, banned=[Worker(0, 1)], seed=3, scale=0.5, audited=True)
    assert again == PLAN and again.digest == PLAN.digest
    assert set(OTHERS) == {field.name for field in fields(StepPlan)}
    digests = [replace(PLAN, **{name: value}).digest for name, value in OTHERS.items()]
    assert len({PLAN.digest, *digests}) == 1 + len(OTHERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_digest_survives_the_collective(dtype: torch.dtype) -> None:
    for number in range(200):
        digest = replace(PLAN, number=number).digest
        assert 0 <= digest < 2**24 and int(torch.tensor(float(digest), dtype=dtype)) == digest


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PLAN.number = 8  # type: ignore[misc]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(banned=st.sets(st.sampled_from(MESH.workers), max_size=2), excluded=st.sets(st.sampled_from(MESH.workers), max_size=2))
def test_who_is_absent_serves_nothing_and_the_weights_are_those_of_the_samples(banned: set[Worker], excluded: set[Worker]) -> None:
    plan = plan_step("training_step", MESH, SIZES, banned=banned, excluded=excluded)
    assert plan.absent == banned | excluded and plan.banned == banned
    serving = {plan.wiring.worker(stage, lane) for stage in range(MESH.stages) for lane in plan.wiring.lanes}
    assert not serving & plan.absent
    for part, (lane, slot) in plan.wiring.places.items():
        assert float(plan.weights[lane, slot]) == pytest.approx(SIZES.work(*part)[1])


def test_no_two_steps_draw_the_same_numbers_and_micro_batches_do_not_depend_on_who_serves_them() -> None:
    part = MicroBatchId(2, 1)
    plans = [replace(PLAN, number=number, run=run) for number in range(3) for run in range(1, 4)]
    evaluations = [replace(plan, kind="validation_step") for plan in plans]
    trained = {plan.seeds(part) for plan in plans}
    evaluated = {plan.seeds(part) for plan in evaluations}
    assert len(trained) == 3, "a step that is done again draws the same"
    assert len(evaluated) == 3, "an evaluation is known by its run"
    assert not trained & evaluated
    assert replace(PLAN, wiring=Wiring.of(MESH, (), 2)).seeds(part) == PLAN.seeds(part)


SEED = 3


def planner(banned: dict[Worker, int] | None = None, **response: Any) -> StepPlanner:
    ledger = Ledger(5)
    ledger.banned_at = banned or {}
    guard = Guard(MESH, MESH.boundaries, None, Verification(seed=0), Response(**response), ledger, torch.device("cpu"))
    return StepPlanner(MESH, guard)


def test_a_planner_numbers_its_runs_and_takes_bans_from_the_ledger() -> None:
    plans = planner({Worker(1, 2): 0})
    first = plans.training(5, SIZES, 0.5, SEED)
    again = plans.training(5, SIZES, 0.5, SEED, excluded={Worker(0, 0)})
    evaluation = plans.evaluation("validation_step", 1, SIZES, SEED)
    assert [plan.run for plan in (first, again, evaluation)] == [1, 2, 3]
    assert first.banned == again.banned == evaluation.banned == {Worker(1, 2)}
    assert (first.absent, again.absent) == ({Worker(1, 2)}, {Worker(0, 0), Worker(1, 2)})
    assert first.audited and not evaluation.audited
    assert not planner(audit_rate=None).training(5, SIZES, 0.5, SEED).audited
    assert (first.log_key, evaluation.log_key) == ("training_step", "validation_step/1")


def test_workers_are_dealt_to_lanes_while_one_is_a_suspect_alike_on_all_ranks() -> None:
    plain = StepPlanner(MESH, None).training(0, SIZES, 1.0, SEED)
    assert plain.wiring == Wiring.of(MESH, (), 2) and plain.banned == frozenset()
    suspicious = [planner(audit_rate=None) for _ in range(2)]
    for one in suspicious:
        assert one.bans is not None
        one.bans.ledger.shuffled_at = 0
    found = [[one.training(step, SIZES, 1.0, SEED) for step in range(4)] for one in suspicious]
    assert found[0] == found[1]
    assert any(plan.wiring != plain.wiring for plan in found[0])


def test_where_no_pipeline_is_left_it_says_so() -> None:
    with pytest.raises(MeshExhaustedError, match=r"No complete pipeline is left at step 3; banned are worker \(stage 1"):
        planner({Worker(1, replica): 0 for replica in range(4)}).training(3, SIZES, 1.0, SEED)
