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


turns = st.integers(0, 1000)


@repeatable
@given(meshes(), turns)
def test_gathered_bans_cost_as_few_lanes_as_possible_at_every_turn(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    wiring = Wiring.gathered(mesh, banned, turn)
    for stage in range(mesh.stages):
        assert sorted(wiring.serving[stage]) == list(range(mesh.replicas))
    served = served_lanes(wiring, mesh)
    assert not banned & set(served)
    assert set(served.values()) <= {1}
    assert sum(wiring.live) == mesh.replicas - most_banned(mesh, banned)
    # Which lanes are used does not depend on the turn: their data would change.
    assert wiring.live == Wiring.gathered(mesh, banned).live


@repeatable
@given(meshes(), turns)
def test_who_serves_at_all_serves_its_own_lane_if_that_is_used(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    wiring = Wiring.gathered(mesh, banned, turn)
    for stage in range(mesh.stages):
        for lane in range(mesh.replicas):
            worker = wiring.serving[stage][lane]
            assert not wiring.live[lane] or worker == lane or not wiring.live[worker]


@repeatable
@given(meshes(), turns)
def test_everybody_who_may_serve_has_a_turn(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    if not any(Wiring.gathered(mesh, banned).live):
        return
    served: Counter[Worker] = Counter()
    for later in range(mesh.replicas):
        served += served_lanes(Wiring.gathered(mesh, banned, turn + later), mesh)
    assert set(served) == set(mesh.workers) - banned


def test_idle_workers_share_the_work_evenly() -> None:
    # Stage 0 has lost two of five workers, so that stage 1 has two to spare.
    mesh, banned = Mesh(2, 5), {Worker(0, 0), Worker(0, 3)}
    served: Counter[Worker] = Counter()
    for turn in range(5):
        served += served_lanes(Wiring.gathered(mesh, banned, turn), mesh)
    assert {served[Worker(1, replica)] for replica in range(5)} == {3}
    assert {served[Worker(0, replica)] for replica in (1, 2, 4)} == {5}


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
