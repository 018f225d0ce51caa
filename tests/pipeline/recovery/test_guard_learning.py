from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.pipeline.step_plan import StepPlan, plan_step
from lightning_sentinel.verification import COLUMNS, Ledger, SignalTable
from lightning_sentinel.verification.contributions import LESSON
from lightning_sentinel.verification.table import no_rows
from tests.pipeline.pipelines import (
    CHANNELS,
    MESH,
    MICRO_BATCHES,
    POSITIONS,
    REPLICAS,
    STAGES,
    WARMUP,
    A,
    G,
    Pipelines,
    Tamper,
    broken,
    honest,
    planned,
    same,
    shouting,
)


@pytest.mark.parametrize("attack", [broken, shouting])
def test_what_was_tampered_with_is_not_learned(attack: Callable[[Collection[Worker]], Tamper]) -> None:
    pipelines = Pipelines().run(WARMUP + 6)
    before = {boundary: verifier.references.momentum.value.clone() for boundary, verifier in pipelines.guard.verifiers.items()}
    trend = pipelines.guard.calibration.trend.clone()
    verdict, _ = pipelines.step(attack({Worker(1, 1)}))
    # Of both its streams, and of what was tainted by them: only the first activation of its pipeline is learned from.
    honest_rows = verdict.honest
    assert honest_rows[0, 1].sum() == (~pipelines.table.flagged[0, 1]).sum() and not honest_rows[1:, 1].any()
    for index, (boundary, verifier) in enumerate(pipelines.guard.verifiers.items()):
        window = pipelines.guard.calibration.alone
        expected = pipelines.table.features[index][honest_rows[index]] - trend[index]
        latest = [(int(window.places[index]) - back) % len(window.values[index]) for back in range(len(expected), 0, -1)]
        assert torch.equal(window.values[index][latest], expected)
        filled = window.values[index][~window.values[index].isnan().all(dim=1)]
        assert filled.isfinite().all()
        assert (verifier.references.momentum.value - before[boundary]).abs().max() < 1


def test_who_spoils_what_its_stage_learns_is_in_the_ledgers_of_all_and_in_the_detections() -> None:
    pipelines, liar = Pipelines(apart=True).run(2), Worker(1, 1)
    assert all(not any(guard.refused) for guard in pipelines.guards)
    pipelines.guard._updates.refused[Worker(0, 2)] += 3
    assert pipelines.guard.refused == (0, 0, 3), "of its own stage a worker tells"
    refused = torch.zeros(STAGES, REPLICAS, REPLICAS)
    refused[1, [0, 2], 1] = 2.0
    for _ in range(2):
        pipelines.draw()
        for group in range(len(pipelines.guards)):
            for micro_batch in range(MICRO_BATCHES):
                pipelines.run_micro_batch(group, micro_batch, honest)
        pipelines.table = pipelines.exchange()
        total = pipelines.sum_over_guards()
        add = partial(torch.where, torch.tensor(True), total)
        for guard, ledger in zip(pipelines.guards, pipelines.ledgers):
            ruling = guard.settle(pipelines.table, pipelines.plan, add, refused=refused)
            told = [(d.step, d.worker, d.feature) for d in ruling.verdict.detections if d.feature == LESSON]
            assert told == [(pipelines.step_number, liar, LESSON)] * (pipelines.step_number == 2)
            assert ledger.flags == {liar: 2} and not ledger.banned, "said again it is no news"
        pipelines.step_number += 1


def test_the_momentum_takes_in_the_mean_of_the_honest_signals() -> None:
    pipelines = Pipelines()
    received: list[Tensor] = []

    def listen(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        if worker.stage == 0 and worker.replica != 2:
            received.append(signal)
        return broken({Worker(0, 2)})(worker, direction, signal)

    pipelines.step(listen)
    assert len(received) == 2 * MICRO_BATCHES
    expected = torch.stack(received).double().mean(dim=(0, 1))
    torch.testing.assert_close(
        pipelines.guard.verifiers[Boundary(0, A)].references.momentum.value.double(), expected, rtol=1e-5, atol=1e-5
    )


def test_cleared_signals_enter_the_momentum_in_the_same_step() -> None:
    pipelines, verifier = Pipelines().run(WARMUP + 6), lambda: pipelines.guard.verifiers[Boundary(0, A)]
    pipelines.pattern = 1.5 * pipelines.pattern
    before, means = verifier().references.momentum.value.clone(), torch.zeros(REPLICAS, MICRO_BATCHES, POSITIONS, CHANNELS)
    sent = [0] * REPLICAS

    def listen(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        if worker.stage == 0:
            if worker.replica == 1:
                signal = 100 * signal
            means[worker.replica, sent[worker.replica]] = signal.mean(dim=0)
            sent[worker.replica] += 1
        return signal

    verdict, _ = pipelines.step(listen)
    assert verdict.suspects == {Worker(0, 1)}
    assert pipelines.table.flagged[0].all() and verdict.honest[0, [0, 2]].all() and not verdict.honest[0, 1].any()
    expected = 0.9 * before + 0.1 * means[[0, 2]].mean(dim=(0, 1))
    torch.testing.assert_close(verifier().references.momentum.value, expected, rtol=1e-5, atol=1e-5)


def test_a_change_of_the_training_is_nobodys_fault() -> None:
    pipelines = Pipelines().run(WARMUP + 6)
    pipelines.pattern = 1.5 * pipelines.pattern
    verdict, _ = pipelines.step()
    assert (pipelines.table.flagged & verdict.honest)[:2].float().mean() > 0.3
    assert not verdict.suspects


def test_a_change_of_the_training_is_learned() -> None:
    pipelines = Pipelines().run(WARMUP + 6)
    pipelines.pattern = 1.5 * pipelines.pattern
    before = pipelines.guard.ledger.total_flags
    pipelines.run(41)
    target = pipelines.guard.verifiers[Boundary(0, A)].references.momentum.value
    assert (target - pipelines.pattern).norm() < 0.2 * pipelines.pattern.norm()
    assert pipelines.guard.ledger.total_flags - before <= 0.05 * 41 * len(MESH.boundaries) * REPLICAS * MICRO_BATCHES


@pytest.mark.parametrize("later", [0, 2], ids=["equal lengths", "different lengths"])
def test_guards_of_separate_processes_know_the_same_as_one_for_all(later: int) -> None:
    apart, whole, attack = Pipelines(apart=True, later=later), Pipelines(later=later), broken({Worker(1, 1)}, G)
    for step in range(WARMUP + 6):
        for pipelines in (apart, whole):
            pipelines.step(attack if step % 3 == 2 else honest)
        torch.testing.assert_close(apart.table.rows, whole.table.rows, rtol=1e-3, atol=1e-4, equal_nan=True)
    states = [guard.state_dict() for guard in apart.guards]
    assert all(same(states[0], state) for state in states[1:])
    assert apart.ledgers[0] == apart.ledgers[1] == apart.ledgers[2] == whole.ledgers[0]
    for name, value in whole.guard.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize(("longer", "later"), [(2, 0), (1, 2)])
def test_replicas_of_different_lengths_teach_each_position_what_was_sent_there(longer: int, later: int) -> None:
    # At a rate that takes more values than there are nothing is flagged but what is not finite.
    pipelines, attack = Pipelines(apart=True, longer=longer, later=later, rate=0.001), broken({Worker(1, 1)}, G)
    plain: dict[tuple[Boundary, int], Tensor] = {}
    beta = {A: Verification().beta_activation, G: Verification().beta_gradient}
    for step in range(WARMUP + 6):
        verdict, _ = pipelines.step(attack if step % 3 == 2 else honest)
        for index, boundary in enumerate(MESH.boundaries):
            keys = [(boundary, replica, m) for _, replica, m in pipelines.sent if verdict.honest[index, replica, m]]
            means = [pipelines.sent[key].double().mean(dim=0) for key in dict.fromkeys(keys)]
            for position in range(max(map(len, means))):
                mean = torch.stack([mean[position] for mean in means if len(mean) > position]).mean(dim=0)
                old = plain.get((boundary, position), mean)
                plain[boundary, position] = beta[boundary.direction] * old + (1 - beta[boundary.direction]) * mean
    states = [guard.state_dict() for guard in pipelines.guards]
    assert all(same(states[0], state) for state in states[1:])
    assert pipelines.ledgers[0] == pipelines.ledgers[1] == pipelines.ledgers[2]
    for boundary, verifier in pipelines.guard.verifiers.items():
        expected = torch.stack([plain[boundary, position] for position in range(len(pipelines.pattern))])
        torch.testing.assert_close(verifier.references.momentum.value.double(), expected, rtol=1e-4, atol=1e-5)


class Receivers:
    """The guards of all workers that receive activations, in processes of their own, while one lane is left out."""

    def __init__(self, verification: Verification, response: Response) -> None:
        self.banned = Worker(0, 0)
        self.generator = torch.Generator().manual_seed(0)
        self.guards = {}
        for worker in MESH.workers:
            if worker.stage > 0:
                ledger = Ledger(response.ban_after)
                ledger.ban(0, [self.banned])
                boundary = Boundary(worker.stage - 1, A)
                self.guards[worker] = Guard(MESH, [boundary], worker, verification, response, ledger, torch.device("cpu"))

    def step(self, number: int) -> set[Worker]:
        """One step; returns who had nothing to do in it."""
        plan = planned(next(iter(self.guards.values())), number)
        wiring = plan.wiring
        for guard in self.guards.values():
            guard.begin(plan)
        rows = no_rows(len(MESH.boundaries), REPLICAS, wiring.slots)
        for lane in wiring.lanes:
            for slot in range(len(wiring.work[lane])):
                signal = torch.randn(4, POSITIONS + slot, CHANNELS, generator=self.generator)
                received = None
                for stage in (1, 2):
                    guard, boundary = self.guards[wiring.worker(stage, lane)], Boundary(stage - 1, A)
                    guard.receive(boundary, signal, torch.tensor([False]), received)
                    # The next stage is twice as wide.
                    received = guard.project(Boundary(stage, A), signal) if stage == 1 else None
                    signal = torch.cat((signal, 0.5 * signal + 1), dim=-1)
        for worker, guard in self.guards.items():
            lane = wiring.lane(worker)
            if lane is not None:
                boundary = Boundary(worker.stage - 1, A)
                rows[MESH.boundaries.index(boundary), lane, : len(wiring.work[lane])] = guard.take_rows(boundary)[0]
        for stage in (1, 2):
            self._settle([guard for worker, guard in self.guards.items() if worker.stage == stage], SignalTable(rows), plan)
        return {worker for worker in self.guards if wiring.lane(worker) is None}

    def _settle(self, guards: list[Guard], table: SignalTable, plan: StepPlan) -> None:
        vectors: list[Tensor] = []
        for guard in guards:
            copy.deepcopy(guard).settle(table, plan, lambda vector: vectors.append(vector) or vector)
        total = torch.stack(vectors).sum(dim=0)
        for guard in guards:
            guard.settle(table, plan, lambda _: total)


@pytest.mark.parametrize("method", ["sentinel", "paper"])
def test_workers_that_have_nothing_to_do_learn_what_their_stage_learns(method: str) -> None:
    receivers, idle = (
        Receivers(Verification(method=method, warmup_steps=4), Response(on_flag="log", ban_after=None, audit_rate=None)),
        set(),
    )
    # Idle workers take turns of sixteen steps.
    for number in (*range(6), 16, 17, 32, 33):
        nobody = receivers.step(number)
        assert {worker.stage for worker in nobody} == {1, 2} and len(nobody) == 2
        idle |= nobody
        for stage in (1, 2):
            first, *others = [guard.state_dict() for worker, guard in receivers.guards.items() if worker.stage == stage]
            assert all(same(first, other) for other in others)
            assert len(first[f"stage{stage - 1}/activation/momentum.value"]) == POSITIONS + 2
    assert idle == set(receivers.guards), "each had nothing to do at some time"


def test_a_process_without_boundaries_has_nothing_to_add() -> None:
    plan = plan_step("training_step", Mesh(1, 2), BatchSizes(MICRO_BATCHES, (4, 4)))
    guard = Guard(Mesh(1, 2), (), Worker(0, 0), Verification(), Response(), Ledger(), torch.device("cpu"))
    table = SignalTable(torch.empty(0, 2, MICRO_BATCHES, len(COLUMNS)))

    def never(vector: Tensor) -> Tensor:
        raise AssertionError("a collective that other ranks do not take part in")

    ruling = guard.settle(table, plan, never)
    assert ruling.banned == [] and not ruling.redo and ruling.verdict.clean.all() and guard.state_dict() == {}
    assert ruling.plan is plan


def test_rows_are_in_the_order_of_replicas_and_micro_batches_and_handed_out_once() -> None:
    pipelines, boundary = Pipelines(later=1), Boundary(0, A)
    for length in (1, MICRO_BATCHES):
        pipelines.draw()
        for micro_batch in range(length):
            pipelines.run_micro_batch(0, micro_batch, broken({Worker(0, 1)}, A) if micro_batch else honest)
        rows = pipelines.guard.take_rows(boundary)
        assert rows.shape == (REPLICAS, length, len(COLUMNS))
        assert rows[..., COLUMNS.index("positions")].tolist() == [[POSITIONS + m for m in range(length)]] * REPLICAS
        flagged = [[replica == 1 and micro_batch == 1 for micro_batch in range(length)] for replica in range(REPLICAS)]
        assert rows[..., COLUMNS.index("flagged")].bool().tolist() == flagged
