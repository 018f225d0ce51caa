from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.data.sample_exchange import AssignedMicroBatch, SampleExchange, deliveries, supplier
from lightning_sentinel.wiring import MicroBatchId, Wiring
from tests.pipeline.ranks import ranks

CPU = torch.device("cpu")
Case = tuple[Mesh, set[Worker], Wiring, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mesh = Mesh(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    banned = draw(st.sets(st.sampled_from(mesh.workers), max_size=mesh.size // 2))
    micro_batches = draw(st.integers(1, 3))
    return mesh, banned, Wiring.of(mesh, banned, micro_batches, draw(st.integers(0, 5))), micro_batches


@settings(derandomize=True, deadline=None, max_examples=200)
@given(case=cases())
def test_the_ends_of_every_lane_are_sent_what_they_did_not_load_and_nothing_else(case: Case) -> None:
    mesh, banned, wiring, _ = case
    expected: Counter[tuple[MicroBatchId, int]] = Counter()
    for rank, worker in enumerate(mesh.workers):
        lane = wiring.lane(worker)
        if lane is not None and worker.stage in (0, mesh.stages - 1):
            expected.update((part, rank) for part in wiring.work[lane] if part.replica != worker.replica)
    found = list(deliveries(wiring, mesh, banned))
    assert Counter((part, receiver) for part, _, receiver in found) == expected
    for part, sender, receiver in found:
        assert mesh.worker(sender).replica == part.replica and mesh.worker(sender) not in banned
        assert mesh.worker(receiver) not in banned


@settings(derandomize=True, deadline=None, max_examples=200)
@given(case=cases(), number=st.integers(0, 99))
def test_samples_come_from_the_nearest_worker_that_loaded_them(case: Case, number: int) -> None:
    mesh, banned, _, _ = case
    worker = mesh.workers[number % mesh.size]
    healthy = [s for s in range(mesh.stages) if Worker(s, worker.replica) not in banned]
    if not healthy:
        return
    part = MicroBatchId(worker.replica, 0)
    ends = [s for s in healthy if s in (0, mesh.stages - 1)]
    expected = worker.stage if worker.stage in healthy else min(ends or healthy)
    assert supplier(part, worker.stage, mesh, banned) == Worker(expected, worker.replica)
    rest = [s for s in healthy if s != worker.stage]
    found = supplier(part, worker.stage, mesh, banned, last_resort=worker)
    assert found.stage in rest if rest else found == worker, "who is asked last is asked if nobody else has them"


def batch_of(replica: int, samples: int) -> dict[str, torch.Tensor]:
    """Samples that say whose they are."""
    return {"inputs": 100.0 * replica + torch.arange(samples)[:, None] + torch.tensor([0.0, 0.25]), "labels": torch.arange(samples)}


@settings(derandomize=True, deadline=None, max_examples=25)
@given(case=cases())
def test_every_lane_gets_its_micro_batches_and_nobody_banned_hands_any_out(case: Case) -> None:
    mesh, banned, wiring, micro_batches = case

    def samples(replica: int) -> int:
        # Batches need not be of the same size.
        return 5 + replica

    def work(rank: int) -> list[AssignedMicroBatch]:
        worker = mesh.worker(rank)
        own = BatchSplitter(None).whole(batch_of(worker.replica, samples(worker.replica))).dealt(micro_batches)
        sizes = BatchSizes(micro_batches, tuple(map(samples, range(mesh.replicas))))
        return SampleExchange(mesh, worker, CPU).of_step(own, sizes, wiring, banned)

    with ranks(mesh.size) as world:
        found = world.run(work)
        assert not {mesh.worker(sender) for sender, _ in world.sent} & banned
    for rank, worker in enumerate(mesh.workers):
        lane = wiring.lane(worker)
        assert [one.micro_batch_id for one in found[rank]] == list([] if lane is None else wiring.work[lane])
        for part, batch, size, weight in found[rank]:
            if worker.stage not in (0, mesh.stages - 1):
                assert batch is None
                continue
            whole = batch_of(part.replica, samples(part.replica))
            pieces = {name: torch.tensor_split(tensor, micro_batches)[part.micro_batch] for name, tensor in whole.items()}
            assert batch.keys() == pieces.keys() and all(torch.equal(batch[name], piece) for name, piece in pieces.items())
            assert (size, weight) == (len(batch["labels"]), len(batch["labels"]) / samples(part.replica))


def test_nothing_is_sent_while_nobody_is_banned() -> None:
    mesh = Mesh(3, 3)
    assert list(deliveries(Wiring.of(mesh, micro_batches=4), mesh, ())) == []


@pytest.mark.parametrize(("size", "fits"), [(16, True), (17, False)])
def test_there_is_room_for_sixteen_times_the_own_batch(size: int, fits: bool) -> None:
    mesh, banned = Mesh(2, 2), {Worker(0, 1)}
    wiring = Wiring.of(mesh, banned)

    def work(rank: int) -> list[AssignedMicroBatch]:
        worker = mesh.worker(rank)
        own = BatchSplitter(None).whole(torch.zeros(size if worker.replica else 1, 3)).dealt(1)
        return SampleExchange(mesh, worker, CPU).of_step(own, BatchSizes(1, (1, size)), wiring, banned)

    with ranks(mesh.size) as world:
        if fits:
            assert world.run(work)[mesh.rank(Worker(0, 0))][1].batch.shape == (size, 3)
        else:
            with pytest.raises(MalformedMessageError, match=r"Rank 1 sent .*announces 204 bytes, and there is room for 192"):
                world.run(work)


@pytest.mark.parametrize("handed", [None, {"x": 1}, [1, 2]], ids=str)
def test_what_is_no_micro_batch_names_its_sender_and_sizes_are_nobodys_word(
    handed: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, banned = Mesh(2, 2), {Worker(0, 1)}
    wiring = Wiring.of(mesh, banned)

    def work(rank: int) -> list[AssignedMicroBatch]:
        own = BatchSplitter(None).whole(torch.zeros(3, 3)).dealt(1)
        return SampleExchange(mesh, mesh.worker(rank), CPU).of_step(own, BatchSizes(1, (3, 3)), wiring, banned)

    monkeypatch.setattr(SampleExchange, "packed", lambda self, own, part: [own[0], 10**9, float("nan")])
    with ranks(mesh.size) as world:
        found = world.run(work)[mesh.rank(Worker(0, 0))]
    assert [(one.samples, one.weight) for one in found] == [(3, 1.0), (3, 1.0)]
    monkeypatch.setattr(SampleExchange, "packed", lambda *_: handed)
    with ranks(mesh.size) as world, pytest.raises(MalformedMessageError, match=r"Rank 1 sent .* where a list of 3 is due") as error:
        world.run(work)
    assert error.value.rank == 1


def test_replicas_without_samples_have_no_work_and_lanes_work_on_those_of_others() -> None:
    """Replica 0 has run out, and replica 1 has lost its first stage: its samples go to lanes 0 and 2."""
    mesh, banned = Mesh(2, 3), {Worker(0, 1)}
    wiring, sizes = Wiring.of(mesh, banned, micro_batches=2), BatchSizes(2, (0, 4, 4))

    def work(rank: int) -> list[AssignedMicroBatch]:
        worker = mesh.worker(rank)
        supply, whole = SampleExchange(mesh, worker, CPU), torch.full((4, 3), float(worker.replica))
        everything = BatchSizes(2, (4, 4, 4))
        supply.of_step(BatchSplitter(None).whole(whole).dealt(2), everything, wiring, banned)
        return supply.of_step(BatchSplitter(None).whole(whole[: sizes.samples[worker.replica]]).dealt(2), sizes, wiring, banned)

    with ranks(mesh.size) as world:
        found = world.run(work)
    for rank, worker in enumerate(mesh.workers):
        lane = wiring.lane(worker)
        expected = [] if lane is None else [part for part in wiring.work[lane] if part.replica != 0]
        assert [one.micro_batch_id for one in found[rank]] == expected
        assert all(
            one.samples == 2 and one.weight == 0.5 and bool((one.batch == one.micro_batch_id.replica).all()) for one in found[rank]
        )
