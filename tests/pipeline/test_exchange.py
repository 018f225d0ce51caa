from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError, PlanMismatchError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.transcript import BINDING_BYTES, Transcript
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.exchange import Exchange
from lightning_sentinel.pipeline.logs import LoggingMicroBatch, LogRecorder
from lightning_sentinel.pipeline.step_plan import StepPlan, plan_step
from lightning_sentinel.pipeline.step_results import StepOutcome, StepResult
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.verification import SignalTable
from lightning_sentinel.verification.table import COLUMNS, no_rows
from lightning_sentinel.wiring import MicroBatchId, Wiring
from tests.pipeline.ranks import Ranks, ranks

CPU = torch.device("cpu")
RUN = bytes(16)
Log = Callable[[LogRecorder, Worker, int], None]


def row(boundary: Boundary, part: MicroBatchId) -> Tensor:
    """Numbers that say which signal it is."""
    number = 1 + part.micro_batch + 10 * part.replica + 100 * boundary.index + 1000 * (boundary.direction is Direction.GRADIENT)
    return number + torch.arange(len(COLUMNS)) / 64


def sizes_of(wiring: Wiring) -> BatchSizes:
    return BatchSizes(1 + max(part.micro_batch for work in wiring.work for part in work), (7,) * len(wiring.work))


def plan_of(mesh: Mesh, wiring: Wiring) -> StepPlan:
    return replace(plan_step("training_step", mesh, sizes_of(wiring)), wiring=wiring)


def exchange_of(mesh: Mesh) -> Exchange:
    return Exchange(mesh, CPU, Transcript(mesh, Credentials(RUN)))


def nothing(**said: Any) -> StepResult:
    """Of a rank that has run no step."""
    return StepResult(torch.zeros(1, 3), **{"recorder": LogRecorder(L.LightningModule())} | said)


def weight_of(wiring: Wiring, part: MicroBatchId) -> float:
    return sizes_of(wiring).work(*part)[1]


def loss_of(part: MicroBatchId) -> float:
    return 1.0 + part.replica - 0.25 * part.micro_batch


def log_loss(recorder: LogRecorder, worker: Worker, step: int) -> None:
    recorder.begin(LoggingMicroBatch(2 + worker.replica, torch.tensor(True)))
    recorder.log("loss", float(worker.replica))


def exchanged(
    world: Ranks,
    mesh: Mesh,
    wiring: Wiring,
    log: Log = log_loss,
    verified: bool = True,
    steps: int = 1,
    claimed: Tensor | None = None,
    broken: Collection[Worker] | None = None,
) -> list[list[StepOutcome]]:
    """Steps of which each rank says what it knows; ranks that have nothing to do claim a loss if one is given."""
    plan = plan_of(mesh, wiring)

    def work(rank: int) -> list[StepOutcome]:
        worker, exchange = mesh.worker(rank), exchange_of(mesh)
        lane = wiring.lane(worker)
        parts = () if lane is None else wiring.work[lane]
        last = worker.stage == mesh.stages - 1
        outcomes = []
        for step in range(steps):
            recorder, loss = LogRecorder(L.LightningModule()), torch.zeros(3)
            if last and parts:
                log(recorder, worker, step)
                weights = [weight_of(wiring, part) for part in parts]
                loss = torch.tensor([sum(w * loss_of(part) for w, part in zip(weights, parts)), sum(weights), 0.0])
            elif claimed is not None:
                loss = claimed
            rows: dict[Boundary, Tensor] | None = None
            if verified:
                received = [boundary for boundary in mesh.boundaries if boundary.receiver == worker.stage and parts]
                rows = {boundary: torch.stack([row(boundary, part) for part in parts])[None] for boundary in received}
            useless = None if broken is None else torch.tensor(worker in broken)
            if broken and worker in broken:
                loss = loss * torch.nan
            outcomes.append(exchange.run(plan, StepResult(loss[None], recorder, rows, useless)))
        return outcomes

    return world.run(work)


def by_hand(mesh: Mesh, wiring: Wiring) -> tuple[Tensor, Tensor]:
    """The table, and the weights, slot by slot."""
    rows, weights = no_rows(len(mesh.boundaries), mesh.replicas, wiring.slots), torch.zeros(mesh.replicas, wiring.slots)
    for lane, parts in enumerate(wiring.work):
        for slot, part in enumerate(parts):
            weights[lane, slot] = weight_of(wiring, part)
            for index, boundary in enumerate(mesh.boundaries) if wiring.live[lane] else ():
                rows[index, lane, slot] = row(boundary, part)
    return rows, weights


@settings(derandomize=True, deadline=None, max_examples=30)
@given(data=st.data(), stages=st.integers(1, 3), replicas=st.integers(1, 4), micro_batches=st.integers(1, 3))
def test_all_ranks_know_of_every_slot_what_those_that_served_it_say(
    data: st.DataObject, stages: int, replicas: int, micro_batches: int
) -> None:
    mesh = Mesh(stages, replicas)
    banned = data.draw(st.sets(st.sampled_from(mesh.workers), max_size=replicas - 1))
    wiring = Wiring.of(mesh, banned, micro_batches, turn=data.draw(st.integers(0, 3)))
    with ranks(mesh.size) as world:
        # What those that serve nothing say of the loss is not asked for.
        found = exchanged(world, mesh, wiring, claimed=torch.tensor([1e6, 1.0, 1.0]))
    rows, weights = by_hand(mesh, wiring)
    rows = SignalTable.believed(rows).rows
    assert torch.equal(plan_of(mesh, wiring).weights, weights)
    parts = [part for lane in wiring.lanes for part in wiring.work[lane]]
    shares = [weight_of(wiring, part) for part in parts]
    loss = sum(share * loss_of(part) for share, part in zip(shares, parts)) / sum(shares)
    serving = [wiring.worker(stages - 1, lane).replica for lane in wiring.lanes]
    samples = [2 + replica for replica in serving]
    for (outcome,) in found:
        assert torch.equal(outcome.table.rows, rows)
        assert outcome.loss == pytest.approx(loss, rel=1e-5)
        mean = sum(replica * n for replica, n in zip(serving, samples)) / sum(samples)
        assert outcome.logged == {"loss": (pytest.approx(mean, rel=1e-5), float(sum(samples)))}


def test_nothing_is_verified_in_a_plain_pipeline() -> None:
    mesh = Mesh(2, 2)
    with ranks(mesh.size) as world:
        found = exchanged(world, mesh, Wiring.of(mesh, micro_batches=2), verified=False)
    assert all(outcome.table is None and outcome.loss is not None for (outcome,) in found)


def test_a_step_in_which_no_sample_counts_has_no_loss() -> None:
    mesh, wiring = Mesh(1, 2), Wiring.of(Mesh(1, 2))
    with ranks(mesh.size) as world:

        def work(rank: int) -> StepOutcome:
            return exchange_of(mesh).run(plan_of(mesh, wiring), nothing())

        assert [outcome.loss for outcome in world.run(work)] == [None, None]


def test_names_are_agreed_upon_once_and_again_when_they_change() -> None:
    mesh, wiring = Mesh(2, 2), Wiring.of(Mesh(2, 2))

    def log(recorder: LogRecorder, worker: Worker, step: int) -> None:
        log_loss(recorder, worker, step)
        if step >= 2:
            recorder.log("largest", 3.0 + worker.replica, prog_bar=True, reduce_fx="max")

    for steps, agreed in ((1, 1), (2, 1), (3, 2), (5, 2)):
        with ranks(mesh.size) as world:
            found = exchanged(world, mesh, wiring, log, steps=steps)
        # To agree takes two broadcasts, the length and the names, and another gather of the values under these names.
        assert world.collectives == {"all_gather": steps + agreed, "broadcast": 2 * agreed}
        for of_rank in found:
            for step, outcome in enumerate(of_rank):
                assert outcome.logged["loss"] == (pytest.approx(0.6), 5.0)
                assert outcome.logged.get("largest") == ((4.0, 5.0) if step >= 2 else None)
                assert step < 2 or outcome.schema.entries["largest"]["options"] == {"prog_bar": True}


def test_replicas_that_log_different_names_are_refused_on_all_ranks() -> None:
    mesh, refused = Mesh(2, 2), []

    def work(rank: int) -> None:
        worker, recorder = mesh.worker(rank), LogRecorder(L.LightningModule())
        if worker.stage:
            recorder.log(f"loss of {worker.replica}", 1.0)
        with pytest.raises(PipelineModelError, match=r"log different names in training_step; this rank logs .*Log the same"):
            exchange_of(mesh).run(plan_of(mesh, Wiring.of(mesh)), nothing(recorder=recorder))
        refused.append(rank)

    with ranks(mesh.size) as world:
        world.run(work)
    assert sorted(refused) == [0, 1, 2, 3]


def test_what_a_worker_without_a_lane_logs_is_not_asked_for() -> None:
    mesh, wiring = Mesh(2, 2), Wiring.of(Mesh(2, 2), {Worker(1, 0)})

    def work(rank: int) -> StepOutcome:
        worker, recorder = mesh.worker(rank), LogRecorder(L.LightningModule())
        if worker.stage:
            recorder.log("loss" if worker.replica else "nonsense", 5.0 + worker.replica)
        return exchange_of(mesh).run(plan_of(mesh, wiring), nothing(recorder=recorder))

    with ranks(mesh.size) as world:
        assert [outcome.logged for outcome in world.run(work)] == [{"loss": (6.0, 1.0)}] * 4


def test_one_step_that_asks_for_the_end_is_heard_by_all_and_nobody_else_is() -> None:
    mesh = Mesh(2, 2)
    wiring = Wiring.of(mesh)
    for asks, heard in [({Worker(1, 1)}, True), ({Worker(0, 0), Worker(0, 1)}, False), (set[Worker](), False)]:

        def work(rank: int, asks: set[Worker] = asks) -> bool:
            return exchange_of(mesh).run(plan_of(mesh, wiring), nothing(stops=mesh.worker(rank) in asks)).stops

        with ranks(mesh.size) as world:
            assert world.run(work) == [heard] * mesh.size


def test_a_signal_that_one_process_has_had_is_known_to_all() -> None:
    mesh = Mesh(2, 2)
    wiring = Wiring.of(mesh)
    had = [(0, 2), (1, 0), (0, 0), (0, 1)]

    def work(rank: int) -> tuple[int, ...]:
        return exchange_of(mesh).run(plan_of(mesh, wiring), nothing(signals=had[rank])).signals

    def no_numbers(said: Tensor) -> Tensor:
        # NaN, as floats, in place of all but what binds it to the step before.
        return torch.cat((torch.full_like(said[:-BINDING_BYTES], 255), said[-BINDING_BYTES:]))

    for says in ({}, {3: no_numbers}):
        with ranks(mesh.size) as world:
            world.says = says
            assert world.run(work) == [(1, 2)] * mesh.size


def test_what_each_worker_has_seen_of_its_stage_is_known_to_all() -> None:
    mesh = Mesh(2, 2)
    wiring = Wiring.of(mesh)

    def work(rank: int) -> Tensor | None:
        worker = mesh.worker(rank)
        return exchange_of(mesh).run(plan_of(mesh, wiring), nothing(refused=(10 * worker.stage + worker.replica, 7))).refused

    with ranks(mesh.size) as world:
        for refused in world.run(work):
            assert refused.tolist() == [[[0, 7], [1, 7]], [[10, 7], [11, 7]]]


def test_whose_gradients_are_of_no_use_is_known_to_all_and_its_loss_is_passed_over() -> None:
    mesh = Mesh(2, 3)
    wiring = Wiring.of(mesh, {Worker(0, 2)}, micro_batches=2)
    useless = {Worker(1, 0), Worker(0, 1), Worker(0, 2)}
    with ranks(mesh.size) as world:
        found = exchanged(world, mesh, wiring, broken=useless)
    for (outcome,) in found:
        expected = [[wiring.worker(s, lane) in useless and wiring.live[lane] for lane in range(3)] for s in range(2)]
        assert outcome.broken.shape == (2, 3, wiring.slots) and outcome.broken.any(dim=2).tolist() == expected
        parts = [part for lane in wiring.lanes if wiring.worker(1, lane) != Worker(1, 0) for part in wiring.work[lane]]
        shares = [weight_of(wiring, part) for part in parts]
        assert outcome.loss == pytest.approx(sum(s * loss_of(part) for s, part in zip(shares, parts)) / sum(shares), rel=1e-5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (2**50, "announces a list of logged names of 1125899906842624 bytes"),
        (-1, "announces a list of logged names of -1 bytes"),
        (0, "announces a list of logged names of 0 bytes"),
        (b"[1]", "What should describe logged values does not"),
        (
            b'{"loss": {"reduce_fx": "mean", "metric": null, "by_batch": false, "options": {"fx": 1}}}',
            "other keys or values",
        ),
        (b'{"loss": {"reduce_fx": "mean", "metric": 3, "by_batch": false, "options": {}}}', "other keys or values"),
    ],
)
def test_names_of_another_rank_are_bounded_and_typed(said: int | bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, refused = Mesh(2, 1), []

    def work(rank: int) -> None:
        recorder = LogRecorder(L.LightningModule())
        if mesh.worker(rank).stage == 1:
            log_loss(recorder, Worker(1, 0), 0)
        with pytest.raises(MalformedMessageError, match=message) as error:
            exchange_of(mesh).run(plan_of(mesh, Wiring.of(mesh)), nothing(recorder=recorder))
        refused.append(error.value.rank)

    with ranks(mesh.size) as world:
        honest = world._broadcast

        def broadcast(tensor: Tensor, source: int) -> Any:
            if isinstance(said, int):
                tensor.fill_(said)
            return honest(tensor, source)

        if isinstance(said, bytes):
            monkeypatch.setattr("lightning_sentinel.pipeline.logs.LogSchema.encode", lambda _: said)
        monkeypatch.setattr(world, "_broadcast", broadcast)
        world.run(work)
    assert refused == [mesh.rank(Worker(1, 0))] * 2


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"scale": 0.5}, {"number": 8}, {"run": 3}, {"absent": frozenset({Worker(0, 1)})}, {"audited": True}]
)
def test_ranks_with_another_plan_are_named_on_all_ranks(change: dict[str, Any]) -> None:
    mesh, told = Mesh(2, 2), []
    plan = plan_of(mesh, Wiring.of(mesh))

    def work(rank: int) -> None:
        mine = replace(plan, **change) if rank == 2 else plan
        with pytest.raises(PlanMismatchError, match=r"another plan than most have rank 2 \(worker \(stage 0, replica 0\)\)"):
            exchange_of(mesh).run(mine, nothing())
        told.append(rank)

    with ranks(mesh.size) as world:
        world.run(work)
    assert sorted(told) == [0, 1, 2, 3]


def test_of_two_ranks_that_disagree_both_are_named() -> None:
    mesh = Mesh(1, 2)
    plan = plan_of(mesh, Wiring.of(mesh))

    def work(rank: int) -> None:
        with pytest.raises(PlanMismatchError, match=r"no plan is that of most of rank 0 .*, rank 1 "):
            exchange_of(mesh).run(replace(plan, seed=rank), nothing())

    with ranks(mesh.size) as world:
        world.run(work)


def test_contributions_are_known_by_worker_to_all_ranks() -> None:
    mesh = Mesh(2, 3)
    wiring = Wiring.of(mesh, {Worker(0, 2)})

    def work(rank: int) -> Tensor | None:
        worker = mesh.worker(rank)
        sketch = torch.tensor([float(worker.stage), float(worker.replica), torch.nan])
        return exchange_of(mesh).run(plan_of(mesh, wiring), nothing(contribution=sketch)).contributions

    with ranks(mesh.size) as world:
        for found in world.run(work):
            assert found[..., :2].tolist() == [[[stage, replica] for replica in range(3)] for stage in range(2)]
            assert found[..., 2].isnan().all()
