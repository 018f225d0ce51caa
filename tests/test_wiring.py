from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.wiring import MicroBatchId, Wiring

repeatable = settings(derandomize=True, deadline=None, max_examples=300)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Mesh, set[Worker]]:
    mesh = Mesh(draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    return mesh, draw(st.sets(st.sampled_from(mesh.workers), max_size=mesh.size))


def most_banned(mesh: Mesh, banned: set[Worker]) -> int:
    return max(sum(worker.stage == stage for worker in banned) for stage in range(mesh.stages))


def served_lanes(wiring: Wiring, mesh: Mesh) -> Counter[Worker]:
    return Counter(wiring.worker(stage, lane) for stage in range(mesh.stages) for lane in range(mesh.replicas) if wiring.live[lane])


turns = st.integers(0, 1000)


@repeatable
@given(meshes(), turns)
def test_gathered_bans_cost_as_few_lanes_as_possible_at_every_turn(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned, turn=turn)
    for stage in range(mesh.stages):
        assert sorted(wiring.serving[stage]) == list(range(mesh.replicas))
    served = served_lanes(wiring, mesh)
    assert not banned & set(served)
    assert set(served.values()) <= {1}
    assert sum(wiring.live) == mesh.replicas - most_banned(mesh, banned)
    # Which lanes are used does not depend on the turn: their data would change.
    assert wiring.live == Wiring.of(mesh, banned).live


@repeatable
@given(meshes(), turns)
def test_who_serves_at_all_serves_its_own_lane_if_that_is_used(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned, turn=turn)
    for stage in range(mesh.stages):
        for lane in range(mesh.replicas):
            worker = wiring.serving[stage][lane]
            assert not wiring.live[lane] or worker == lane or not wiring.live[worker]


@repeatable
@given(meshes(), turns)
def test_everybody_who_may_serve_has_a_turn(case: tuple[Mesh, set[Worker]], turn: int) -> None:
    mesh, banned = case
    if not any(Wiring.of(mesh, banned).live):
        return
    served: Counter[Worker] = Counter()
    for later in range(mesh.replicas):
        served += served_lanes(Wiring.of(mesh, banned, turn=turn + later), mesh)
    assert set(served) == set(mesh.workers) - banned


def test_idle_workers_share_the_work_evenly() -> None:
    # Stage 0 has lost two of five workers, so that stage 1 has two to spare.
    mesh, banned = Mesh(2, 5), {Worker(0, 0), Worker(0, 3)}
    served: Counter[Worker] = Counter()
    for turn in range(5):
        served += served_lanes(Wiring.of(mesh, banned, turn=turn), mesh)
    assert {served[Worker(1, replica)] for replica in range(5)} == {3}
    assert {served[Worker(0, replica)] for replica in (1, 2, 4)} == {5}


@repeatable
@given(meshes())
def test_gathering_moves_nobody_without_need(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned)
    for stage in range(mesh.stages):
        for lane in range(mesh.replicas):
            if wiring.live[lane] and Worker(stage, lane) not in banned:
                assert wiring.serving[stage][lane] == lane
    assert Wiring.of(mesh, set()).serving == (tuple(range(mesh.replicas)),) * mesh.stages


counts = st.integers(1, 4)


@repeatable
@given(meshes(), counts)
def test_every_micro_batch_is_worked_on_once_by_a_lane_that_is_used_unless_nobody_has_it(
    case: tuple[Mesh, set[Worker]], micro_batches: int
) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned, micro_batches)
    everything = {MicroBatchId(replica, number) for replica in range(mesh.replicas) for number in range(micro_batches)}
    assert wiring.places.keys() == everything and sum(map(len, wiring.work)) == len(everything)
    lost = {r for r in range(mesh.replicas) if all(Worker(stage, r) in banned for stage in range(mesh.stages))}
    for (replica, _), (lane, _) in wiring.places.items():
        assert wiring.live[lane] == (replica not in lost) or not any(wiring.live)
        assert lane == replica or not wiring.live[replica]
    if wiring.lanes:
        loads = [len(wiring.work[lane]) for lane in wiring.lanes]
        assert max(loads) - min(loads) <= 1


@repeatable
@given(meshes(), counts)
def test_values_are_arranged_as_lanes_work_on_them(case: tuple[Mesh, set[Worker]], micro_batches: int) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned, micro_batches)
    values = torch.arange(1, 1 + mesh.size * micro_batches).view(mesh.stages, mesh.replicas, micro_batches)
    arranged = wiring.arrange(values)
    assert arranged.shape == (mesh.stages, mesh.replicas, wiring.slots)
    for (replica, number), (lane, slot) in wiring.places.items():
        assert torch.equal(arranged[:, lane, slot], values[:, replica, number])
    assert (arranged != 0).sum() == values.numel()


@repeatable
@given(meshes())
def test_a_worker_knows_its_lane(case: tuple[Mesh, set[Worker]]) -> None:
    mesh, banned = case
    wiring = Wiring.of(mesh, banned)
    for worker in mesh:
        lane = wiring.lane(worker)
        assert lane is None or (wiring.worker(worker.stage, lane) == worker and wiring.live[lane])
    assert sum(wiring.lane(worker) is not None for worker in mesh) == mesh.stages * len(wiring.lanes)


@repeatable
@given(meshes(), turns, st.integers(0, 2**62))
def test_shuffled_workers_serve_the_same_lanes_in_other_company(case: tuple[Mesh, set[Worker]], turn: int, seed: int) -> None:
    mesh, banned = case
    wiring, shuffled = Wiring.of(mesh, banned, turn=turn), Wiring.of(mesh, banned, turn=turn, shuffled=seed)
    assert (shuffled.live, shuffled.work) == (wiring.live, wiring.work)
    assert served_lanes(shuffled, mesh) == served_lanes(wiring, mesh)
    # Where the steps run nobody moves: what they log is that of their own samples.
    assert shuffled.serving[-1] == wiring.serving[-1]
    for stage in range(mesh.stages):
        assert sorted(shuffled.serving[stage]) == list(range(mesh.replicas))


def test_shuffled_workers_meet_everybody() -> None:
    mesh, met = Mesh(3, 4), set()
    for seed in range(100):
        serving = Wiring.of(mesh, shuffled=seed).serving
        met |= {(serving[0][lane], serving[1][lane], serving[2][lane]) for lane in range(4)}
    assert len(met) == 4**3
