from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.wiring import Wiring

repeatable = settings(derandomize=True, deadline=None, max_examples=300)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Mesh, set[Worker]]:
    mesh = Mesh(draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    return mesh, draw(st.sets(st.sampled_from(mesh.workers), max_size=mesh.size))


def most_banned(mesh: Mesh, banned: set[Worker]) -> int:
    return max(sum(worker.stage == stage for worker in banned) for stage in range(mesh.stages))


def served_lanes(wiring: Wiring, mesh: Mesh) -> Counter[Worker]:
    return Counter(wiring.worker(stage, lane) for stage in range(mesh.stages) for lane in range(mesh.replicas) if wiring.live[lane])


@repeatable
@given(meshes())
def test_fixed_lanes_are_their_own_workers_and_lost_with_one_of_them(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    wiring = Wiring.fixed(mesh, banned)
    assert wiring.serving == (tuple(range(mesh.replicas)),) * mesh.stages
    assert wiring.live == tuple(all(Worker(s, lane) not in banned for s in range(mesh.stages)) for lane in range(mesh.replicas))
    assert not banned & set(served_lanes(wiring, mesh))


@repeatable
@given(meshes())
def test_gathered_bans_cost_as_few_lanes_as_possible(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    wiring = Wiring.gathered(mesh, banned)
    for stage in range(mesh.stages):
        assert sorted(wiring.serving[stage]) == list(range(mesh.replicas))
    served = served_lanes(wiring, mesh)
    assert not banned & set(served)
    assert set(served.values()) <= {1}
    assert sum(wiring.live) == mesh.replicas - most_banned(mesh, banned)


@repeatable
@given(meshes())
def test_gathering_moves_nobody_without_need(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    wiring = Wiring.gathered(mesh, banned)
    for stage in range(mesh.stages):
        for lane in range(mesh.replicas):
            if wiring.live[lane] and Worker(stage, lane) not in banned:
                assert wiring.serving[stage][lane] == lane
    assert Wiring.gathered(mesh, set()) == Wiring.fixed(mesh)


@repeatable
@given(meshes(), st.integers(0, 20))
def test_work_is_taken_over_by_the_others_of_a_stage_while_one_is_left(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    wiring = Wiring.taken_over(mesh, banned, turn)
    possible = most_banned(mesh, banned) < mesh.replicas
    assert wiring.live == (possible,) * mesh.replicas
    served = served_lanes(wiring, mesh)
    assert not banned & set(served)
    for stage in range(mesh.stages):
        assert len(wiring.serving[stage]) == mesh.replicas
        fit = [lane for lane in range(mesh.replicas) if Worker(stage, lane) not in banned]
        assert all(wiring.serving[stage][lane] == lane for lane in fit)
        if possible:
            # The load is even: nobody helps twice before everybody has helped once.
            loads = [served[Worker(stage, lane)] for lane in fit]
            assert max(loads) - min(loads) <= 1


@repeatable
@given(meshes())
def test_taking_over_goes_round(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    for stage in range(mesh.stages):
        fit = [lane for lane in range(mesh.replicas) if Worker(stage, lane) not in banned]
        for lane in set(range(mesh.replicas)) - set(fit):
            helpers = Counter(Wiring.taken_over(mesh, banned, turn).serving[stage][lane] for turn in range(2 * len(fit)))
            assert helpers == Counter(dict.fromkeys(fit, 2))
