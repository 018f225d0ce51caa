from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.sealed_draws import SealedDraws
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.step_plan import StepPlan, plan_step
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.verification.draws import Draws
from tests.pipeline.ranks import ranks
from tests.pipeline.recovery.toys import credentials

MESH = Mesh(2, 2)
LIAR = MESH.worker(3)


def planned(step: int = 7, audited: bool = True) -> StepPlan:
    return plan_step("training_step", MESH, BatchSizes(2, (4, 4)), number=step, audited=audited)


def opened(
    seed: int | None = None, says: Callable[[Tensor], Tensor] | None = None, shows: Digest | None = None, silent: bool = False
) -> list[tuple[Draws, frozenset[Worker]]]:
    """What each rank hears in a step, of which one rank may show another seal, or say another number."""
    plan = planned()
    drawn = [SealedDraws(MESH, worker, seed, Transcript(MESH, credentials(MESH, worker))) for worker in MESH.workers]
    sealed = {worker: seal for worker, one in zip(MESH.workers, drawn) if (seal := one.seal(plan)) is not None}
    assert len(sealed) == MESH.size
    if silent:
        del sealed[LIAR]
    if shows is not None:
        sealed[LIAR] = shows

    def work(rank: int) -> tuple[Draws, frozenset[Worker]]:
        return drawn[rank].open(plan, sealed)

    with ranks(MESH.size) as world:
        world.says = {} if says is None else {MESH.rank(LIAR): says}
        return world.run(work)


def test_all_ranks_hear_what_each_has_drawn() -> None:
    first, *rest = opened()
    assert all(one == first for one in rest)
    draws, liars = first
    assert set(draws.numbers) == set(MESH.workers) and len(set(draws.numbers.values())) == MESH.size and not liars
    assert opened()[0][0].numbers != draws.numbers, "nobody can foresee them"


def test_those_of_a_repeatable_run_are_those_of_a_virtual_mesh() -> None:
    assert opened(seed=5)[0][0] == Draws.seeded(MESH, 5, 7)


@pytest.mark.parametrize("lie", ["another number", "no seal", "the seal of another"])
def test_who_does_not_open_its_seal_is_named_and_draws_nothing(lie: str) -> None:
    says = (lambda said: said + 1) if lie == "another number" else None
    other = SealedDraws(MESH, MESH.worker(0), 5, Transcript(MESH, credentials(MESH, MESH.worker(0)))).seal(planned())
    found = opened(seed=5, says=says, shows=other if lie == "the seal of another" else None, silent=lie == "no seal")
    for draws, liars in found:
        assert liars == {LIAR}
        assert draws.numbers == {worker: one for worker, one in Draws.seeded(MESH, 5, 7).numbers.items() if worker != LIAR}


def test_a_step_that_is_not_audited_draws_nothing() -> None:
    drawn = SealedDraws(MESH, MESH.worker(0), None, Transcript(MESH, credentials(MESH, MESH.worker(0))))
    assert drawn.seal(planned(audited=False)) is None
    assert drawn.seal(planned()) != drawn.seal(planned())
