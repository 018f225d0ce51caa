from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.guard import Guard, Ruling
from lightning_sentinel.verification import COLUMNS, Ledger, SignalTable, StepVerdict
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.projection import Projection
from lightning_sentinel.wiring import Wiring

STAGES, REPLICAS, MICRO_BATCHES = 3, 3, 2
SAMPLES, POSITIONS, CHANNELS = 4, 5, 6
WARMUP = 12
A, G = Direction.ACTIVATION, Direction.GRADIENT
MESH = Mesh(STAGES, REPLICAS)

Tamper = Callable[[Worker, Direction, Tensor], Tensor]


def honest(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
    return signal


def broken(workers: Collection[Worker], *directions: Direction) -> Tamper:
    """These workers send NaN."""

    def tamper(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return signal * math.nan if worker in workers and direction in (directions or tuple(Direction)) else signal

    return tamper


def shouting(workers: Collection[Worker]) -> Tamper:
    """These workers send finite values far out."""

    def tamper(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return 1000 * signal if worker in workers else signal

    return tamper


class Pipelines:
    """A mesh driven by hand: what a stage sends follows from what it went on with.

    A guard of its own for each replica if ``apart``, as in real processes, else one that all replicas share. Sequences grow with
    the micro-batch by ``later`` positions, and with the replica by ``longer``, which one guard for all could not receive at once.
    """

    def __init__(
        self,
        response: Response | None = None,
        *,
        window: int = 512,
        apart: bool = False,
        longer: int = 0,
        later: int = 0,
        rewires: bool = False,
    ) -> None:
        assert apart or not longer
        self.response = response or Response(ban_after=None)
        self.generator = torch.Generator().manual_seed(0)
        verification = Verification(warmup_steps=WARMUP, window=window)
        self.longer, self.later = longer, later
        longest = POSITIONS + longer * (REPLICAS - 1) + later * (MICRO_BATCHES - 1)
        self.pattern = 2 * torch.randn(longest, CHANNELS, generator=torch.Generator().manual_seed(99))
        self.groups = [[replica] for replica in range(REPLICAS)] if apart else [list(range(REPLICAS))]
        self.ledgers = [Ledger(self.response.ban_after) for _ in self.groups]
        self.guards = [
            Guard(MESH, MESH.boundaries, replicas, verification, self.response, ledger, torch.device("cpu"), rewires)
            for replicas, ledger in zip(self.groups, self.ledgers)
        ]
        self.step_number = 0
        self.received: list[tuple[Tensor, Tensor]] = []
        """What each receipt of the latest step was given, and what came of it."""
        self.lies: dict[tuple[int, int, int], bool] = {}
        """Whether a signal is not what an honest worker would have sent, by index of the boundary, lane and micro-batch."""
        self.audited: list[tuple[int, Tensor]] = []
        self.sent: dict[tuple[Boundary, int, int], Tensor] = {}
        self.went_on_with: dict[tuple[Boundary, int, int], Tensor] = {}
        self.table = SignalTable(torch.empty(0))

    @property
    def guard(self) -> Guard:
        return self.guards[0]

    def noise(self, replica: int = 0, micro_batch: int = 0) -> Tensor:
        positions = POSITIONS + self.longer * replica + self.later * micro_batch
        return torch.randn(SAMPLES, positions, CHANNELS, generator=self.generator)

    def projected(self, boundary: Boundary, replicas: list[int], micro_batch: int) -> Projection | None:
        before = MESH.before(boundary)
        if before is None:
            return None
        received = torch.cat([self.went_on_with[before, replica, micro_batch] for replica in replicas])
        return self.guard.project(boundary, received)

    def draw(self) -> None:
        """The noise of a step, which is the same whether guards are apart or not."""
        self.drawn = {
            (replica, micro_batch): iter([self.noise(replica, micro_batch) for _ in range(2 * STAGES)])
            for replica in range(REPLICAS)
            for micro_batch in range(MICRO_BATCHES)
        }

    def run_micro_batch(self, group: int, micro_batch: int, tamper: Tamper) -> None:
        """One micro-batch of all replicas of a guard, forward and back."""
        guard, replicas = self.guards[group], self.groups[group]

        def noise() -> Tensor:
            return torch.cat([next(self.drawn[replica, micro_batch]) for replica in replicas])

        def cross(boundary: Boundary, signals: Tensor, taint: Tensor) -> tuple[Tensor, Tensor]:
            pieces = zip(replicas, signals.split(SAMPLES))
            wiring = guard.wiring(self.step_number)
            sent = [tamper(wiring.worker(boundary.sender, replica), boundary.direction, piece) for replica, piece in pieces]
            for replica, (mine, piece) in zip(replicas, zip(sent, signals.split(SAMPLES))):
                self.lies[MESH.boundaries.index(boundary), replica, micro_batch] = mine is not piece and not torch.equal(
                    mine, piece
                )
            given = torch.cat(sent)
            # A gradient follows from the one behind, an activation from the one before; the noise in them is new.
            known = self.projected(boundary, replicas, micro_batch)
            went_on, taint = guard.receive(boundary, given, taint, known)
            assert taint.shape == (len(replicas),) and taint.dtype == torch.bool
            self.received.append((given, went_on))
            for replica, mine, piece in zip(replicas, sent, went_on.split(SAMPLES)):
                self.sent[boundary, replica, micro_batch] = mine
                self.went_on_with[boundary, replica, micro_batch] = piece
            return went_on, taint

        signals, taint = noise(), guard.initial_taint(self.step_number)
        pattern = self.pattern[: signals.shape[1]]
        for index in range(STAGES - 1):
            signals, taint = cross(Boundary(index, A), 0.3 * signals + pattern * (index + 1) + 0.5 * noise(), taint)
        signals = 0.01 * signals + 0.1 * noise()
        for index in reversed(range(STAGES - 1)):
            signals, taint = cross(Boundary(index, G), 0.5 * signals + 0.1 * noise(), taint)

    def exchange(self) -> SignalTable:
        rows = [torch.cat([guard.take_rows(boundary) for guard in self.guards]) for boundary in MESH.boundaries]
        return SignalTable(torch.stack(rows))

    def attempt(self, tamper: Tamper = honest) -> Ruling:
        """One step up to its verdict; the same noise again if it has been drawn and is to be used again."""
        self.received.clear()
        for group in range(len(self.guards)):
            for micro_batch in range(MICRO_BATCHES):
                self.run_micro_batch(group, micro_batch, tamper)
        self.table = self.exchange()
        total = self.sum_over_guards()
        audit = self.audit if self.guard.audits else None
        rulings = [
            guard.settle(self.table, self.step_number, (lambda vector: vector) if total is None else (lambda vector: total), audit)
            for guard in self.guards
        ]
        return rulings[0]

    def audit(self, boundary: int, signals: Tensor) -> Tensor:
        self.audited.append((boundary, signals.clone()))
        lies = torch.zeros_like(signals)
        for lane, micro_batch in signals.nonzero().tolist():
            lies[lane, micro_batch] = self.lies[boundary, lane, micro_batch]
        return lies

    def step(self, tamper: Tamper = honest) -> tuple[StepVerdict, list[Worker]]:
        self.draw()
        ruling = self.attempt(tamper)
        assert not ruling.redo
        self.step_number += 1
        return ruling.verdict, ruling.banned

    def sum_over_guards(self) -> Tensor | None:
        """The all-reduce by hand: copies of the guards say what each would add. ``None`` if one holds all."""
        if len(self.guards) == 1:
            return None
        vectors: list[Tensor] = []

        def listen(vector: Tensor) -> Tensor:
            vectors.append(vector)
            return vector

        for guard in self.guards:
            copy.deepcopy(guard).settle(self.table, self.step_number, listen)
        assert len(vectors) in (0, len(self.guards)) and len({vector.shape for vector in vectors}) <= 1
        return torch.stack(vectors).sum(dim=0) if vectors else None

    def run(self, steps: int, tamper: Tamper = honest) -> Pipelines:
        for _ in range(steps):
            self.step(tamper)
        return self


def dirty(verdict: StepVerdict) -> set[tuple[int, int]]:
    """``(stage, replica)`` of which no micro-batch counts."""
    return {tuple(entry) for entry in (~verdict.clean).all(dim=2).nonzero().tolist()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    # Places of a window that are not filled are NaN.
    return one.keys() == other.keys() and all(torch.allclose(one[n].float(), other[n].float(), 0, 0, equal_nan=True) for n in one)


# --- One step


@pytest.mark.parametrize("steps_before", [0, 1, WARMUP + 6])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_broken_activation_is_replaced_and_nobody_downstream_is_blamed(stage: int, steps_before: int) -> None:
    pipelines = Pipelines().run(steps_before)
    stand_in = pipelines.guard.verifiers[Boundary(stage, A)].substitute(torch.ones(SAMPLES, POSITIONS, CHANNELS))
    earlier = pipelines.guard.ledger.total_flags
    verdict, banned = pipelines.step(broken({Worker(stage, 1)}, A))
    mine = [detection for detection in verdict.detections if detection.feature == "non_finite"]
    assert [(d.worker, d.direction, d.micro_batch) for d in mine] == [(Worker(stage, 1), A, m) for m in range(MICRO_BATCHES)]
    # Right after so short a warm-up others may be out of line as well, but nobody because of this.
    assert {worker for worker in verdict.suspects if worker.replica == 1} == {Worker(stage, 1)} and banned == []
    assert pipelines.guard.ledger.total_flags - earlier == len(verdict.detections)
    assert {(s, 1) for s in range(STAGES)} <= dirty(verdict)
    assert all(signal.isfinite().all() for signal in pipelines.went_on_with.values())
    for micro_batch in range(MICRO_BATCHES):
        assert torch.equal(pipelines.went_on_with[Boundary(stage, A), 1, micro_batch], stand_in)
    # Everything after it is tainted: the activations of later stages, and all gradients.
    tainted = pipelines.table.tainted
    for index, boundary in enumerate(MESH.boundaries):
        after = boundary.direction is G or boundary.index > stage
        assert tainted[index, 1].all() == after and not tainted[index, [0, 2]].any()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_broken_gradient_is_left_out_of_the_stages_that_it_reaches(stage: int) -> None:
    pipelines = Pipelines().run(2)
    verdict, _ = pipelines.step(broken({Worker(stage, 2)}, G))
    assert verdict.suspects == {Worker(stage, 2)}
    assert {detection.direction for detection in verdict.detections} == {G}
    assert dirty(verdict) == {(below, 2) for below in range(stage)}
    for index in range(stage):
        for micro_batch in range(MICRO_BATCHES):
            assert not pipelines.went_on_with[Boundary(index, G), 2, micro_batch].any()


def test_honest_signals_go_on_as_they_are() -> None:
    pipelines = Pipelines().run(WARMUP + 2)
    guard, boundary = pipelines.guard, Boundary(0, A)
    sent = [pipelines.pattern + 0.58 * pipelines.noise(replica) for replica in range(REPLICAS)]
    stand_in = guard.verifiers[boundary].substitute(sent[0])
    for before in ([False] * REPLICAS, [False, True, False], [True] * REPLICAS):
        received, after = guard.receive(boundary, torch.cat(sent), torch.tensor(before))
        assert (after | ~torch.tensor(before)).all()
        for mine, got, tainted in zip(sent, received.split(SAMPLES), after):
            assert torch.equal(got, stand_in if tainted else mine)
    assert not guard.receive(boundary, torch.cat(sent), torch.zeros(REPLICAS, dtype=torch.bool))[1].all()


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2)], ids=str)
@pytest.mark.parametrize("direction", Direction)
def test_signals_of_any_shape_are_replaced_sender_by_sender(direction: Direction, shape: tuple[int, ...]) -> None:
    boundary, generator = Boundary(0, direction), torch.Generator().manual_seed(0)
    guard = Guard(MESH, [boundary], range(REPLICAS), Verification(), Response(), Ledger(), torch.device("cpu"))
    sent = [torch.randn(shape, generator=generator) for _ in range(REPLICAS)]
    sent[2].view(-1)[5] = math.nan
    received, tainted = guard.receive(boundary, torch.cat(sent), torch.tensor([True, False, False]))
    assert tainted.tolist() == [True, False, True] and received.shape == (REPLICAS * shape[0], *shape[1:])
    first, second, third = received.split(shape[0])
    assert not first.any() and torch.equal(second, sent[1]) and not third.any()


def test_a_signal_far_out_is_found_after_the_warm_up_only() -> None:
    pipelines, attack = Pipelines(), shouting({Worker(1, 0)})
    assert not copy.deepcopy(pipelines).run(2).step(attack)[0].detections
    verdict, _ = pipelines.run(WARMUP + 6).step(attack)
    assert verdict.suspects == {Worker(1, 0)}
    assert {(stage, 0) for stage in range(STAGES)} <= dirty(verdict)


def test_honest_workers_are_rarely_flagged_and_none_is_a_suspect_for_long() -> None:
    pipelines = Pipelines(Response(ban_after=4)).run(WARMUP + 50)
    assert not pipelines.guard.ledger.banned
    signals = 50 * len(MESH.boundaries) * REPLICAS * MICRO_BATCHES
    assert pipelines.guard.ledger.total_flags <= 0.03 * signals


def test_only_reporting_leaves_values_and_weights_untouched() -> None:
    pipelines = Pipelines(Response(on_flag="log", ban_after=None)).run(2)
    assert not pipelines.guard.excludes
    verdict, banned = pipelines.step(broken({Worker(0, 1)}, A))
    assert len(pipelines.received) == len(MESH.boundaries) * MICRO_BATCHES
    assert all(went_on is given for given, went_on in pipelines.received)
    for key, signal in pipelines.went_on_with.items():
        torch.testing.assert_close(signal, pipelines.sent[key], rtol=0, atol=0, equal_nan=True)
    assert verdict.clean.all() and banned == []
    # NaN spreads through the pipeline, and yet only its source is blamed.
    assert pipelines.went_on_with[Boundary(0, G), 1, 0].isnan().all()
    assert set(verdict.flagged) == verdict.suspects == {Worker(0, 1)}


# --- What is learned


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
    pipelines, attack = Pipelines(apart=True, longer=longer, later=later), broken({Worker(1, 1)}, G)
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


def test_a_process_without_boundaries_has_nothing_to_add() -> None:
    guard = Guard(Mesh(1, 2), (), [0], Verification(), Response(), Ledger(), torch.device("cpu"))
    table = SignalTable(torch.empty(0, 2, MICRO_BATCHES, len(COLUMNS)))

    def never(vector: Tensor) -> Tensor:
        raise AssertionError("a collective that other ranks do not take part in")

    ruling = guard.settle(table, 0, never)
    assert ruling.banned == [] and not ruling.redo and ruling.verdict.clean.all() and guard.state_dict() == {}
    assert ruling.wiring == Wiring.fixed(Mesh(1, 2))


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


@pytest.mark.parametrize("replicas", [[0], [2], [2, 0], [0, 1, 2]], ids=str)
def test_a_guard_starts_with_the_taint_of_its_own_replicas(replicas: list[int]) -> None:
    ledger = Ledger()
    ledger.banned_at[Worker(1, 2)] = 0
    guard = Guard(MESH, MESH.boundaries, replicas, Verification(), Response(), ledger, torch.device("cpu"))
    assert guard.initial_taint(0).tolist() == [replica == 2 for replica in replicas]


# --- Bans


@pytest.mark.parametrize("ban_after", [1, 3])
def test_a_ban_follows_and_the_run_goes_on_without_the_pipeline(ban_after: int) -> None:
    pipelines, culprit = Pipelines(Response(ban_after=ban_after)), Worker(1, 2)
    outcomes = [pipelines.step(broken({culprit})) for _ in range(ban_after + 3)]
    assert [banned for _, banned in outcomes] == [[]] * (ban_after - 1) + [[culprit]] + [[]] * 3
    ledger = pipelines.guard.ledger
    assert ledger.banned_at == {culprit: ban_after - 1}
    assert ledger.flags == {culprit: MICRO_BATCHES * ban_after}
    assert pipelines.guard.wiring(0).live == (True, True, False)
    assert pipelines.guard.initial_taint(0).tolist() == [False, False, True]
    verdict, _ = outcomes[-1]
    assert dirty(verdict) == {(stage, 2) for stage in range(STAGES)}
    assert verdict.detections == () and verdict.verified == {worker for worker in MESH if worker.replica != 2}


def test_the_mesh_is_exhausted_when_every_pipeline_has_a_banned_worker() -> None:
    pipelines = Pipelines(Response(ban_after=2))
    culprits = [Worker(0, 0), Worker(2, 1), Worker(1, 2)]
    pipelines.step(broken(culprits))
    with pytest.raises(MeshExhaustedError) as caught:
        pipelines.step(broken(culprits))
    message = str(caught.value)
    assert all(str(worker) in message for worker in culprits)
    assert "step 1" in message and f"{REPLICAS} replica" in message and "sentinel_monitor" in message
    assert pipelines.guard.ledger.banned == set(culprits)


def test_a_run_that_was_exhausted_when_it_was_saved_is_exhausted_when_it_is_loaded() -> None:
    pipelines = Pipelines(Response(ban_after=2)).run(1)
    pipelines.guard.ledger.load_state_dict(
        {"flags": [], "streaks": [], "banned_at": [[0, replica, 0] for replica in range(REPLICAS)]}
    )
    with pytest.raises(MeshExhaustedError):
        pipelines.step()


def test_one_pipeline_left_is_enough() -> None:
    pipelines = Pipelines(Response(ban_after=1))
    # One after the other: a majority that fails at once is taken for a training that has diverged.
    for worker in (Worker(0, 0), Worker(0, 1)):
        _, banned = pipelines.step(broken({worker}))
        assert banned == [worker]
    verdict, _ = pipelines.step()
    assert verdict.clean[:, 2].all() and not verdict.clean[:, :2].any()


# --- State


@pytest.mark.parametrize("steps", [0, 3, WARMUP, WARMUP + 3, WARMUP + 4])
def test_a_loaded_guard_goes_on_identically(steps: int) -> None:
    original, loaded = Pipelines().run(steps), Pipelines()
    state = {name: value.clone() for name, value in original.guard.state_dict().items()}
    assert {name.rsplit("/", 1)[0] for name in state} == {boundary.name for boundary in MESH.boundaries}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded.guard.load_state_dict(torch.load(file, weights_only=True))
    assert same(loaded.guard.state_dict(), state)
    for pipelines in (original, loaded):
        pipelines.generator.manual_seed(5)
        pipelines.run(4, shouting({Worker(0, 1)}))
    # What follows from a gradient that was replaced by zero is tainted, and some of its features are not numbers.
    assert same({"rows": original.table.rows}, {"rows": loaded.table.rows})
    assert same(original.guard.state_dict(), loaded.guard.state_dict())


def test_a_guard_loads_what_it_holds_and_starts_the_rest_afresh() -> None:
    state = Pipelines().run(WARMUP + 3).guard.state_dict()
    kept = {name: value for name, value in state.items() if name.startswith("stage0/activation/")}
    loaded = Pipelines()
    loaded.guard.load_state_dict(kept)
    updates = {boundary.name: verifier.references.updates for boundary, verifier in loaded.guard.verifiers.items()}
    assert updates == {"stage0/activation": WARMUP + 3, "stage1/activation": None, "stage1/gradient": None, "stage2/gradient": None}
    assert loaded.guard.calibration.steps == WARMUP + 3
    fenced = {b.name: bool(v.fences.upper.isfinite().any()) for b, v in loaded.guard.verifiers.items()}
    assert fenced == {"stage0/activation": True, "stage1/activation": False, "stage1/gradient": False, "stage2/gradient": False}
    loaded.run(2)


def test_memory_does_not_grow_with_steps() -> None:
    window = 32
    pipelines = Pipelines(window=window).run(WARMUP + 6)
    k = CHANNELS
    references = POSITIONS * k + POSITIONS + k + k * k + 4 * 7 + 1
    regression = (k + 1) * (k + 1 + k)
    fences = window * len(FEATURES) + (5 + 1) * len(FEATURES)  # and the spread of the last steps
    calibration = 2 * fences + 1 + len(FEATURES) + 3 * REPLICAS * len(FEATURES)
    # The senders of two of the four boundaries have received something.
    expected = len(MESH.boundaries) * (references + calibration) + 2 * regression
    for _ in range(2):
        state = pipelines.run(10).guard.state_dict()
        assert sum(value.numel() for value in state.values()) == expected
    assert pipelines.guard._rows == {boundary: [] for boundary in MESH.boundaries}


# --- Audits


def audited(rate: float = 1e-9, **options: Any) -> Response:
    return Response(**{"audit_rate": rate, **options})


def test_with_audits_signals_go_on_as_they_are_until_the_step_is_settled() -> None:
    pipelines = Pipelines(audited(on_flag="log", ban_after=None), rewires=True).run(2)
    guard = pipelines.guard
    assert guard.audits and not guard.excludes
    pipelines.draw()
    pipelines.attempt(broken({Worker(0, 1)}, A))
    assert all(went_on is given for given, went_on in pipelines.received)
    assert not pipelines.table.tainted.any()


@pytest.mark.parametrize("steps_before", [0, 1, WARMUP + 3])
def test_one_lie_bans_and_the_step_is_done_again_without_the_liar(steps_before: int) -> None:
    pipelines, culprit = Pipelines(audited(), rewires=True).run(steps_before), Worker(1, 2)
    before = {name: value.clone() for name, value in pipelines.guard.state_dict().items()}
    pipelines.audited.clear()
    pipelines.draw()
    ruling = pipelines.attempt(broken({culprit}, A))
    assert (ruling.redo, ruling.banned, ruling.verdict.guilty) == (True, [culprit], {culprit})
    after = pipelines.guard.state_dict()
    # All but the rounds of the schedule: what was drawn for the step was drawn.
    assert after.pop("audits/rounds") > before.pop("audits/rounds")
    assert same(before, after), "nothing is learned of a step that is done again"
    # Replica 2 of stage 1 is the first on the way, so that nothing behind it was audited.
    behind = [(index, int(signals[2].sum())) for index, signals in pipelines.audited if MESH.boundaries[index] != Boundary(1, A)]
    assert all(count == 0 for index, count in behind if index >= 2)
    wiring = pipelines.guard.wiring(pipelines.step_number)
    assert wiring == Wiring.taken_over(MESH, {culprit}, pipelines.step_number) and all(wiring.live)
    pipelines.draw()
    again = pipelines.attempt(broken({culprit}, A))
    assert not again.redo and again.banned == [] and again.verdict.clean.all()
    assert all(verifier.references.updates == steps_before + 1 for verifier in pipelines.guard.verifiers.values())
    assert pipelines.guard.calibration.steps == steps_before + 1


def test_flags_that_an_audit_drops_are_counted_as_exonerated_and_learned_from() -> None:
    pipelines = Pipelines(audited(), rewires=True).run(WARMUP + 6)
    ledger, calibration = pipelines.guard.ledger, pipelines.guard.calibration
    exonerated, audits, flags = ledger.exonerated.total(), ledger.audits, ledger.total_flags
    pipelines.pattern = 3 * pipelines.pattern
    places = calibration.alone.places.clone()
    verdict, banned = pipelines.step()
    dropped = [detection for detection in verdict.detections if detection.confirmed is False]
    assert len(dropped) == len(verdict.detections) > REPLICAS and banned == [] and not ledger.banned
    assert ledger.exonerated.total() - exonerated == len(dropped) and ledger.total_flags == flags
    assert ledger.audits - audits == verdict.audits >= len(dropped)
    assert verdict.honest.all()
    size = calibration.alone.values.shape[1]
    assert ((calibration.alone.places - places) % size == REPLICAS * MICRO_BATCHES).all()


def test_a_rate_of_one_finds_what_no_feature_shows() -> None:
    culprit = Worker(1, 0)

    def slightly(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        return 1.01 * signal if worker == culprit else signal

    pipelines = Pipelines(audited(1.0), rewires=True)
    pipelines.draw()
    ruling = pipelines.attempt(slightly)
    assert ruling.banned == [culprit] and ruling.redo
    assert ruling.verdict.audits < len(MESH.boundaries) * REPLICAS * MICRO_BATCHES


def test_a_run_that_bans_nobody_reports_what_audits_find_and_is_not_done_again() -> None:
    pipelines = Pipelines(audited(on_flag="log", ban_after=None), rewires=True).run(2)
    verdict, banned = pipelines.step(broken({Worker(1, 1)}, A))
    assert verdict.guilty == {Worker(1, 1)} and banned == [] and not pipelines.guard.ledger.banned
    assert not verdict.honest[1:, 1].any()


def test_the_mesh_is_exhausted_when_a_stage_has_nobody_left() -> None:
    pipelines = Pipelines(audited(), rewires=True)
    everyone = {Worker(1, replica) for replica in range(REPLICAS)}
    pipelines.draw()
    with pytest.raises(MeshExhaustedError, match=r"step 0"):
        pipelines.attempt(broken(everyone, A))


@pytest.mark.parametrize(
    ("response", "rewires", "expected"),
    [
        (Response(), False, lambda banned: Wiring.fixed(MESH, banned)),
        (Response(), True, lambda banned: Wiring.gathered(MESH, banned)),
        (audited(), True, lambda banned: Wiring.taken_over(MESH, banned, 5)),
        (audited(), False, lambda banned: Wiring.fixed(MESH, banned)),
    ],
)
def test_the_wiring_follows_from_the_bans(response: Response, rewires: bool, expected: Callable[[set[Worker]], Wiring]) -> None:
    pipelines = Pipelines(response, rewires=rewires)
    for banned in (set(), {Worker(1, 0)}, {Worker(1, 0), Worker(2, 1)}):
        pipelines.guard.ledger.banned_at = dict.fromkeys(banned, 0)
        assert pipelines.guard.wiring(5) == expected(banned)


def test_a_step_of_which_every_sender_is_mixed_leaves_the_momentum_where_it_was() -> None:
    pipelines = mixed_step()[0]
    assert all(verifier.references.momentum.value.isfinite().all() for verifier in pipelines.guard.verifiers.values())


def mixed_step() -> tuple[Pipelines, dict[str, Tensor]]:
    """A step in which each sender lies in one of its two micro-batches: of no sender is all of it honest."""
    pipelines = Pipelines(audited(1.0, on_flag="log", ban_after=None), rewires=True).run(3)
    before = {name: value.clone() for name, value in pipelines.guard.verifiers[Boundary(0, A)].state_dict().items()}
    sent = dict.fromkeys(MESH.workers, 0)

    def half(worker: Worker, direction: Direction, signal: Tensor) -> Tensor:
        if worker.stage == 0 and direction is A:
            sent[worker] += 1
            return signal + 1.0 if sent[worker] == 1 else signal
        return signal

    verdict, _ = pipelines.step(half)
    assert verdict.honest[0, :, 1].all() and not verdict.honest[0, :, 0].any()
    return pipelines, before


def test_a_step_of_which_every_sender_is_mixed_teaches_nothing() -> None:
    pipelines, before = mixed_step()
    assert same(before, pipelines.guard.verifiers[Boundary(0, A)].state_dict())


def test_a_worker_that_takes_over_a_lane_does_not_take_over_its_drift() -> None:
    pipelines = Pipelines(Response(), rewires=True).run(WARMUP + 1)
    guard = pipelines.guard
    guard.ledger.ban(0, [Worker(0, 0), Worker(1, 1)])
    wiring = guard.wiring(pipelines.step_number)
    assert wiring.serving[1] == (1, 0, 2) and wiring.live == (False, True, True)
    # The sum that had Worker(1, 1) banned; Worker(1, 0) serves its lane now.
    guard.calibration.drift.sums[0, MESH.boundaries.index(Boundary(1, A)), 1, 0] = 20.0
    verdict, banned = pipelines.step()
    assert Worker(1, 0) not in verdict.suspects and banned == []


@pytest.mark.parametrize("response", [Response(ban_after=1), audited()], ids=["flags", "audits"])
def test_a_ban_clears_those_behind_the_liar_of_their_sums(response: Response) -> None:
    pipelines = Pipelines(response, rewires=True).run(WARMUP)
    drift, at = pipelines.guard.calibration.drift, {b: i for i, b in enumerate(MESH.boundaries)}
    drift.sums[0, :, :, 3] = 7.0
    pipelines.draw()
    assert pipelines.attempt(broken({Worker(1, 2)}, A)).banned == [Worker(1, 2)]
    for boundary in MESH.boundaries:
        behind = boundary.direction is G or boundary.index > 1
        assert (drift.height[at[boundary], 2] < 5) == behind
        assert (drift.height[at[boundary], [0, 1]] > 5).all()


# --- What is drawn


def test_what_was_drawn_is_saved_and_goes_on() -> None:
    original, loaded, other = (Pipelines(audited(0.07), rewires=True) for _ in range(3))
    original.run(9)
    state = {name: value.clone() for name, value in original.guard.state_dict().items()}
    assert float(state["audits/rounds"]) == pytest.approx(9 * 0.07)
    loaded.guard.load_state_dict(state)
    other.guard.load_state_dict({name: value for name, value in state.items() if name != "audits/rounds"})
    drawn = {}
    for name, pipelines in (("original", original), ("loaded", loaded), ("other", other)):
        pipelines.step_number, pipelines.audited = 9, []
        pipelines.generator.manual_seed(5)
        pipelines.run(20)
        drawn[name] = torch.stack([signals for _, signals in pipelines.audited])
    assert torch.equal(drawn["original"], drawn["loaded"]) and not torch.equal(drawn["original"], drawn["other"])


def test_a_guard_without_audits_saves_and_reads_no_rounds() -> None:
    guard = Pipelines().run(1).guard
    assert "audits/rounds" not in guard.state_dict()
    guard.load_state_dict(Pipelines(audited(0.5), rewires=True).run(2).guard.state_dict())


def test_every_signal_is_audited_once_in_a_round_and_bans_make_rounds_shorter() -> None:
    pipelines = Pipelines(audited(0.25), rewires=True)
    signals = len(MESH.boundaries) * REPLICAS * MICRO_BATCHES
    for _ in range(2):
        before = pipelines.guard.ledger.audits
        pipelines.run(4)
        assert pipelines.guard.ledger.audits - before == signals
    pipelines.draw()
    assert pipelines.attempt(broken({Worker(0, 1)})).banned == [Worker(0, 1)]
    pipelines.draw()
    again = pipelines.attempt(broken({Worker(0, 1)}))
    assert not again.redo and again.verdict.audits > 0, "what was drawn for the first attempt is drawn again"
    assert pipelines.guard._schedule.rounds == pytest.approx(9 * 0.25), "and once only"
    pipelines.step_number += 1
    before = pipelines.guard.ledger.audits
    pipelines.run(4)
    assert pipelines.guard.ledger.audits - before == pytest.approx(3 * signals, rel=0.25)


def test_what_the_senders_had_received_is_projected_by_the_method_that_uses_it() -> None:
    signal = torch.ones(SAMPLES, POSITIONS, CHANNELS)
    for method in ("sentinel", "paper"):
        config = Verification(method=method)
        guard = Guard(MESH, MESH.boundaries, range(REPLICAS), config, Response(), Ledger(), torch.device("cpu"))
        projected = [guard.project(boundary, signal) for boundary in MESH.boundaries]
        assert guard.compares_inputs == (method == "sentinel")
        if method == "paper":
            assert projected == [None] * len(MESH.boundaries)
            continue
        assert {p.values.shape for p in projected} == {(SAMPLES, POSITIONS, CHANNELS)}
        assert {p.channels for p in projected} == {CHANNELS}
        # Along the directions of the verifier itself, which differ from boundary to boundary.
        for boundary, found in zip(MESH.boundaries, projected):
            assert torch.equal(found.values, guard.verifiers[boundary]._secret.project(signal).values)
        assert len({float(p.values[0, 0, 0]) for p in projected}) == len(MESH.boundaries)


def test_idle_workers_take_turns_of_sixteen_steps() -> None:
    pipelines = Pipelines(Response(ban_after=1), rewires=True)
    pipelines.guard.ledger.ban(0, [Worker(0, 0)])
    wirings = [pipelines.guard.wiring(step) for step in range(3 * 16 + 1)]
    assert wirings == [Wiring.gathered(MESH, {Worker(0, 0)}, step // 16) for step in range(3 * 16 + 1)]
    assert len(set(wirings)) == 3 and wirings[0] == wirings[-1]


def test_a_ruling_says_who_served() -> None:
    pipelines, culprit = Pipelines(Response(ban_after=1), rewires=True), Worker(1, 2)
    pipelines.draw()
    ruling = pipelines.attempt(broken({culprit}))
    # The worker that the step bans still served in it.
    assert ruling.banned == [culprit] and ruling.wiring == Wiring.gathered(MESH, ())
    pipelines.step_number += 1
    pipelines.draw()
    assert pipelines.attempt().wiring == Wiring.gathered(MESH, {culprit})


def test_who_drifts_is_asked_once_and_forgotten_if_honest() -> None:
    mesh_index = MESH.boundaries.index(Boundary(1, A))
    pipelines = Pipelines(audited(), rewires=True).run(WARMUP + 1)
    sums = pipelines.guard.calibration.drift.sums
    sums[0, mesh_index, 2, 3] = 12.0
    verdict, banned = pipelines.step()
    assert banned == [] and verdict.cleared[mesh_index, 2]
    assert pipelines.guard.calibration.drift.height[mesh_index, 2] == 0
