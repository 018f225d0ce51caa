from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import MeshExhaustedError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.pipeline.recovery.guard import Guard
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.wiring import MicroBatchId
from tests.pipeline.pipelines import (
    CHANNELS,
    MESH,
    MICRO_BATCHES,
    POSITIONS,
    RATE,
    REPLICAS,
    SAMPLES,
    STAGES,
    WARMUP,
    A,
    G,
    Pipelines,
    broken,
    dirty,
    same,
    shouting,
)


def flags(**options: Any) -> Response:
    """Without audits."""
    return Response(**{"audit_rate": None, **options})


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
    guard = Guard(MESH, [boundary], range(REPLICAS), Verification(), flags(), Ledger(), torch.device("cpu"))
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
    pipelines = Pipelines(flags(ban_after=4)).run(WARMUP + 50)
    assert not pipelines.guard.ledger.banned
    signals = 50 * len(MESH.boundaries) * REPLICAS * MICRO_BATCHES
    assert pipelines.guard.ledger.total_flags <= RATE * signals


def test_only_reporting_leaves_values_and_weights_untouched() -> None:
    pipelines = Pipelines(flags(on_flag="log", ban_after=None)).run(2)
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


# --- Bans


@pytest.mark.parametrize("ban_after", [1, 3])
def test_a_ban_follows_and_the_run_goes_on_without_it(ban_after: int) -> None:
    pipelines, culprit = Pipelines(flags(ban_after=ban_after)), Worker(1, 2)
    outcomes = [pipelines.step(broken({culprit})) for _ in range(ban_after + 3)]
    assert [banned for _, banned in outcomes] == [[]] * (ban_after - 1) + [[culprit]] + [[]] * 3
    ledger = pipelines.guard.ledger
    assert ledger.banned_at == {culprit: ban_after - 1}
    assert ledger.flags == {culprit: MICRO_BATCHES * ban_after}
    assert pipelines.planned(0).wiring.live == (True, True, False)
    # The others of its stage go on, two at a time; of its pipeline's data nothing is lost.
    verdict, _ = outcomes[-1]
    assert pipelines.wiring.places.keys() == {MicroBatchId(replica, m) for replica in range(REPLICAS) for m in range(MICRO_BATCHES)}
    assert all(verdict.clean[:, :2, k].all() for k in range(MICRO_BATCHES)) and verdict.clean.shape == (
        STAGES,
        REPLICAS,
        MICRO_BATCHES + 1,
    )
    assert verdict.detections == () and verdict.verified == {worker for worker in MESH if worker.replica != 2}


def test_bans_in_every_pipeline_cost_one_pipeline_if_they_are_in_different_stages() -> None:
    pipelines, culprits = Pipelines(flags(ban_after=2)), [Worker(0, 0), Worker(2, 1), Worker(1, 2)]
    pipelines.run(3, broken(culprits))
    assert pipelines.guard.ledger.banned == set(culprits) and len(pipelines.wiring.lanes) == 2


def test_flags_never_ban_so_many_that_the_run_ends_and_what_is_flagged_stays_out_of_the_weights() -> None:
    pipelines = Pipelines(flags(ban_after=2))
    culprits = [Worker(1, replica) for replica in range(REPLICAS)]
    for worker in culprits:
        # One after the other: a majority that fails at once is taken for a training that has diverged.
        for _ in range(3):
            verdict, _ = pipelines.step(broken({worker}))
    ledger = pipelines.guard.ledger
    assert ledger.banned == {culprits[0]} and set(ledger.spared) == {culprits[2]}
    assert len(pipelines.wiring.lanes) == 2
    lane = pipelines.wiring.lane(culprits[2])
    assert {(stage, lane) for stage in range(STAGES)} <= dirty(verdict)


def test_a_run_whose_bans_leave_no_pipeline_does_not_begin() -> None:
    pipelines = Pipelines(flags(ban_after=2)).run(1)
    pipelines.guard.ledger.load_state_dict(
        {"flags": [], "streaks": [], "banned_at": [[0, replica, 0] for replica in range(REPLICAS)]}
    )
    with pytest.raises(MeshExhaustedError, match=r"step 1; banned are worker \(stage 0, replica 0\).*Response\(banned") as caught:
        pipelines.step()
    assert f"{REPLICAS} replica" in str(caught.value)


# --- State


@pytest.mark.parametrize("steps", [0, 3, WARMUP, WARMUP + 3, WARMUP + 4])
def test_a_loaded_guard_goes_on_identically(steps: int) -> None:
    original, loaded = Pipelines().run(steps), Pipelines()
    state = {name: value.clone() for name, value in original.guard.state_dict().items()}
    assert {name.rsplit("/", 1)[0] for name in state} == {"secret", *(boundary.name for boundary in MESH.boundaries)}
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


def test_the_secret_is_drawn_kept_with_what_was_learned_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([5, 6])
    monkeypatch.setattr("lightning_sentinel.seeds.secrets.randbits", lambda bits: next(drawn))
    settings = Verification(warmup_steps=WARMUP)
    one, other = (Guard(MESH, MESH.boundaries, None, settings, Response(), Ledger(), torch.device("cpu")) for _ in range(2))
    signal = torch.ones(SAMPLES, POSITIONS, CHANNELS)

    def seen(guard: Guard) -> list[torch.Tensor]:
        along = [guard.verifiers[boundary]._secret.project(signal).values for boundary in MESH.boundaries]
        assert all(torch.equal(guard.project(b, signal).values, mine) for b, mine in zip(MESH.boundaries, along))
        return along

    assert not any(torch.equal(mine, its) for mine, its in zip(seen(one), seen(other)))
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(mine, its) for mine, its in zip(seen(one), seen(other)))
    assert settings.seed is None and "seed=None" in repr(settings)


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
    # Values and who sent them; the fences' shape, their scale, that of the warm-up and the resolution; four numbers of each worker.
    fences = window * (len(FEATURES) + 1) + 1 + (5 + 3) * len(FEATURES) + 4 * REPLICAS * len(FEATURES)
    calibration = 2 * fences + 1 + len(FEATURES) + 5 * REPLICAS * len(FEATURES) + REPLICAS
    # The senders of two of the four boundaries have received something.
    expected = len(MESH.boundaries) * (references + calibration) + 2 * regression + 1
    for _ in range(2):
        state = pipelines.run(10).guard.state_dict()
        assert sum(value.numel() for value in state.values()) == expected
    assert pipelines.guard._rows == {boundary: [] for boundary in MESH.boundaries}
