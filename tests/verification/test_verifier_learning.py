from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import COLUMNS, BoundaryVerifier
from lightning_sentinel.verification.features import FEATURES, watched
from lightning_sentinel.verification.references import Contribution
from lightning_sentinel.verification.window import FenceRule, FenceWindow
from tests.verification.rigs import (
    CHANNELS,
    FLAGGED,
    MICRO_BATCHES,
    NO,
    NOBODY,
    POSITIONS,
    REPLICAS,
    SAMPLES,
    SCORE,
    TAINTED,
    WORST,
    YES,
    Honest,
    Rig,
    inspect_one,
    known_of,
)

# --- What is learned


def test_the_momentum_is_the_average_of_the_honest_means() -> None:
    rig = Rig(beta_activation=0.7)
    expected = None
    for _ in range(8):
        signals = [rig.stream.signal() for _ in range(6)]
        for micro_batch in (signals[:3], signals[3:]):
            rig.verifier.inspect(torch.cat(micro_batch), torch.tensor([False] * 3))
        rig.verifier.learn(rig.verifier.contribution(torch.tensor([True] * 3), torch.tensor([False] * 3)))
        mean = np.mean([signal.double().numpy().mean(axis=0) for signal in signals], axis=0)
        expected = mean if expected is None else 0.7 * expected + 0.3 * mean
    np.testing.assert_allclose(rig.verifier.references.momentum.value.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", Direction)
def test_each_direction_has_its_decay(direction: Direction) -> None:
    verifier = Rig(direction, beta_activation=0.6, beta_gradient=0.3).verifier
    assert (
        verifier.references.momentum.beta
        == verifier.references.beta
        == {Direction.ACTIVATION: 0.6, Direction.GRADIENT: 0.3}[direction]
    )


def _non_finite(verifier: BoundaryVerifier, positions: int = POSITIONS) -> None:
    for replica, value in enumerate((math.nan, math.inf)):
        signal = torch.ones(SAMPLES, positions, CHANNELS)
        signal[0, 0, 0] = value
        assert inspect_one(verifier, replica, signal)[1]


def _far_out(verifier: BoundaryVerifier, positions: int = POSITIONS) -> None:
    assert inspect_one(verifier, 1, torch.full((SAMPLES, positions, CHANNELS), 1e3))[1]


def _tainted(verifier: BoundaryVerifier, positions: int = POSITIONS) -> None:
    for value in (1e3, math.nan):
        row, flagged = inspect_one(verifier, 2, torch.full((SAMPLES, positions, CHANNELS), value), YES)
        assert not flagged
        assert (row[FLAGGED], row[TAINTED]) == (0, 1)
        assert row[SCORE] > 1


@pytest.mark.parametrize("others", [_non_finite, _far_out, _tainted])
def test_flagged_and_tainted_signals_teach_nothing(rigs: Callable[..., Rig], others: Callable[[BoundaryVerifier], None]) -> None:
    alone, beside = rigs(), rigs()
    for _ in range(3):
        assert torch.equal(alone.step(), beside.step(others))
    assert_same_state(alone.verifier, beside.verifier)


def test_cleared_replicas_count_with_all_their_finite_means(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    near = [
        rig.verifier.references.momentum.value + torch.zeros(SAMPLES, 1, 1) + 0.1 * rig.stream.noise(SAMPLES, POSITIONS, CHANNELS)
    ]
    far = [torch.full((SAMPLES, POSITIONS, CHANNELS), value) for value in (50.0, -70.0)]
    broken = torch.full((SAMPLES, POSITIONS, CHANNELS), math.nan)
    honest = [rig.stream.signal() for _ in range(3)]
    sent = {0: [honest[0], far[0]], 1: [honest[1], far[1], broken], 2: [honest[2]], 3: near}

    def contribution(cleared: list[int]) -> tuple[np.ndarray, list[float]]:
        verifier, kept = copy.deepcopy(rig.verifier), []
        for replica, signals in sent.items():
            for signal in signals:
                _, flagged = inspect_one(verifier, replica, signal)
                if not flagged or (replica in cleared and signal.isfinite().all()):
                    kept.append(signal.double().numpy().mean(axis=0))
        step = verifier.contribution(~NOBODY, torch.tensor([replica in cleared for replica in range(REPLICAS)]))
        total, count = step.positions.total.numpy(), step.positions.count.tolist()
        np.testing.assert_allclose(total, np.sum(kept, axis=0), rtol=1e-4, atol=1e-4)
        assert count == [len(kept)] * POSITIONS and step.signals.item() == len(kept)
        return total, count

    none, first, both = contribution([]), contribution([0]), contribution([0, 1])
    np.testing.assert_allclose(first[0] - none[0], 50, atol=1e-3)
    np.testing.assert_allclose(both[0] - first[0], -70, atol=1e-3)
    assert both[1][0] == none[1][0] + 2


def test_a_sum_of_flagged_means_that_overflows_stays_out(rigs: Callable[..., Rig]) -> None:
    # Each mean is finite and flagged; their sum is infinite. Nobody cleared it, so nothing of it may enter the momentum.
    rig = rigs()
    honest, loud = rig.stream.signal(), torch.full((SAMPLES, POSITIONS, CHANNELS), 3e38)
    loud[1:] = -7e37  # So that the sum over samples, of which the mean is taken, is finite.
    for _ in range(20):
        flagged = rig.verifier.inspect(torch.cat((honest, loud)), torch.tensor([False, False])).flagged
        assert flagged.tolist() == [False, True]
    step = rig.verifier.contribution(torch.tensor([True, True]), torch.tensor([False, False]))
    assert step.positions.total.isfinite().all() and step.statistics.isfinite().all()


def test_senders_whose_unflagged_signals_do_not_count_are_left_out(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    signals = [rig.stream.signal() for _ in range(REPLICAS)]
    rig.verifier.inspect(torch.cat(signals), NOBODY)
    step = rig.verifier.contribution(torch.tensor([True, False, True, False]), NOBODY)
    expected = (signals[0].mean(dim=0) + signals[2].mean(dim=0)).numpy()
    np.testing.assert_allclose(step.positions.total.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert step.signals.item() == 2


def test_a_step_that_is_done_again_teaches_once(rigs: Callable[..., Rig]) -> None:
    once, twice = rigs(), rigs()
    twice.verifier.inspect(torch.cat([100 * once.stream.mean.expand(SAMPLES, -1, -1)] * REPLICAS), NOBODY)
    twice.verifier.forget_step()
    with pytest.raises(RuntimeError, match="nothing to contribute"):
        twice.verifier.contribution(~NOBODY, NOBODY)
    assert torch.equal(once.step(), twice.step())
    assert_same_state(once.verifier, twice.verifier)


# --- Several senders at once


def one_of_each(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, step: int, micro_batch: int
) -> list[Tensor]:
    """Signals of three senders, on a grid so coarse that sums of means do not depend on their order.

    The second shouts in some steps after the warm-up, and is not finite in one micro-batch of others. Lengths vary.
    """
    if len(shape) == 3:
        shape = (shape[0], shape[1] + (step + micro_batch) % 3, shape[2])
    signals = [torch.randn(shape, generator=generator).add(2).mul(8).round().div(8) for _ in range(3)]
    if step > 8 and step % 4 == 1:
        signals[1] = 64 * signals[1]
    if step % 4 == 2 and micro_batch == 0:
        signals[1].view(-1)[3] = math.inf
    return [signal.to(dtype) for signal in signals]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2)], ids=str)
def test_senders_at_once_are_verifiers_of_one_sender_each(shape: tuple[int, ...], dtype: torch.dtype, direction: Direction) -> None:
    def verifier() -> BoundaryVerifier:
        return BoundaryVerifier(Boundary(0, direction), Verification(warmup_steps=8))

    def close(one: Tensor, other: Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3, equal_nan=True)

    together, apart, generator = verifier(), [verifier() for _ in range(3)], torch.Generator().manual_seed(4)
    window, seen = FenceWindow(1, 128, FenceRule(watched(Verification()), 0.01, True)), torch.zeros(3, dtype=torch.long)
    for step in range(14):
        honest = []
        for micro_batch in range(MICRO_BATCHES):
            signals = one_of_each(shape, dtype, generator, step, micro_batch)
            tainted = torch.tensor([False, False, step % 5 == 3])
            rows, flagged = together.inspect(torch.cat(signals), tainted)
            singles = [one.inspect(signals[sender], tainted[sender : sender + 1]) for sender, one in enumerate(apart)]
            finite = rows[:, WORST] >= 0
            close(rows[finite, : len(FEATURES)], torch.cat([single.rows for single in singles])[finite, : len(FEATURES)])
            assert torch.equal(rows[:, FLAGGED:], torch.cat([single.rows for single in singles])[:, FLAGGED:])
            assert torch.equal(flagged, torch.cat([single.flagged for single in singles]))
            honest.append(rows[~flagged & ~tainted & finite, : len(FEATURES)])
            seen += flagged
        unflagged, cleared = torch.tensor([True, step % 3 != 0, True]), torch.tensor([True, False, False])
        whole = together.contribution(unflagged, cleared)
        parts = [one.contribution(unflagged[i : i + 1], cleared[i : i + 1]) for i, one in enumerate(apart)]
        length = len(whole.positions.count)
        flat = torch.stack([part.resized(length).flat() for part in parts]).sum(dim=0)
        summed = Contribution.from_flat(flat, whole)
        assert whole.signals == summed.signals and torch.equal(whole.positions.count, summed.positions.count)
        close(whole.flat(), summed.flat())
        values = torch.cat(honest)
        if step > 2:
            window.add(values[None], torch.ones(1, len(values), dtype=torch.bool))
        if step >= 8:
            window.fit()
        for one in (together, *apart):
            one.learn(whole)
            one.fences = window.fences.of(0)
        assert_same_state(together, apart[0])
    assert seen[1] >= 6


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 1], [1, 1, 2], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2)], ids=str)
def test_a_lane_teaches_what_a_verifier_learns_that_sees_this_lane_alone(shape: tuple[int, ...], places: list[int]) -> None:
    def verifier() -> BoundaryVerifier:
        return BoundaryVerifier(Boundary(0, Direction.ACTIVATION), Verification())

    together, lanes, generator = verifier(), [verifier() for _ in range(3)], torch.Generator().manual_seed(4)
    tainted = torch.tensor([False, True, False])
    # In the third step a signal is not finite, which is flagged.
    for micro_batch in range(3):
        signals = one_of_each(shape, torch.float32, generator, micro_batch, 0)
        rows, _ = together.inspect(torch.cat(signals), tainted, lanes=torch.tensor(places))
        for sender, lane in enumerate(places):
            (row,), _ = lanes[lane].inspect(signals[sender], tainted[sender : sender + 1])
            torch.testing.assert_close(rows[sender], row, rtol=2e-3, atol=2e-3, equal_nan=True)
    for lane, alone in enumerate(lanes):
        chosen = torch.arange(3) == lane
        whole = together.contribution(chosen, chosen)
        if lane in places:
            flat = alone.contribution(YES, YES).resized(len(whole.positions.count)).flat()
            torch.testing.assert_close(whole.flat(), flat, rtol=2e-3, atol=2e-3)
        else:
            assert not whole.flat().any()


@pytest.mark.parametrize("method", ["sentinel", "paper"])
@pytest.mark.parametrize("with_input", [False, True], ids=["first stage", "later stage"])
@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2), (4, 6, 40)], ids=str)
def test_who_stands_by_learns_what_the_others_learn(shape: tuple[int, ...], with_input: bool, method: str) -> None:
    config, generator = Verification(method=method), torch.Generator().manual_seed(4)
    serving, idle = (BoundaryVerifier(Boundary(1, Direction.ACTIVATION), config) for _ in range(2))
    with_input = with_input and method == "sentinel"
    for step in range(5):
        signal = torch.randn(shape, generator=generator)
        received = known_of(serving, signal[:, : shape[1] // 2] if len(shape) == 2 else 0.5 * signal) if with_input else None
        row = serving.inspect(signal, NO, received).rows[0]
        positions, channels = (int(row[COLUMNS.index(name)]) for name in ("positions", "channels"))
        idle.stand_by(positions, channels, received.channels if received is not None else None)
        taught, nothing = serving.contribution(YES, NO), idle.contribution(YES, YES)
        assert nothing.flat().shape == taught.flat().shape and not nothing.flat().any()
        whole = Contribution.from_flat(taught.flat() + nothing.flat(), nothing)
        for one in (serving, idle):
            one.learn(whole)
        assert_same_state(serving, idle)
        assert serving.references.updates == step + 1
    # From then on it can do the work of the other.
    assert torch.equal(serving.inspect(signal, NO, received).rows, idle.inspect(signal, NO, received).rows)


def test_a_contribution_is_asked_for_once() -> None:
    rig = Rig()
    rig.step()
    with pytest.raises(RuntimeError, match=r"stage1/activation.*nothing to contribute"):
        rig.verifier.contribution(~NOBODY, NOBODY)
    rig.verifier.inspect(rig.stream.signal(), NO)
    assert rig.verifier.contribution(YES, NO).positions.count.tolist() == [1] * POSITIONS


@pytest.mark.parametrize("longer", [_tainted, _non_finite, _far_out])
def test_positions_that_nobody_honest_sent_are_not_compared(rigs: Callable[..., Rig], longer: Callable[..., None]) -> None:
    # Sequences vary in length. A longer one that was tainted or flagged must not leave a momentum of zero behind.
    rig, positions = rigs(), 2 * POSITIONS
    honest = torch.cat((rig.stream.mean, rig.stream.mean)) + rig.stream.noise(SAMPLES, positions, CHANNELS)
    before = rig.score(honest)
    longer(rig.verifier, positions)
    rig.verifier.contribution(~NOBODY, NOBODY)
    rig.verifier.learn(None)
    assert rig.score(honest) == pytest.approx(before, rel=1e-3)


def test_values_whose_squares_overflow_are_not_learned() -> None:
    rig = Rig()
    rig.run(2)
    rig.verifier.inspect(1e25 * rig.stream.signal(), NO)
    rig.verifier.learn(rig.verifier.contribution(YES, NO))
    assert all(value.isfinite().all() for value in rig.verifier.state_dict().values())


# --- State


def assert_same_state(one: BoundaryVerifier, other: BoundaryVerifier) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("steps", [0, 1, 8])
def test_a_loaded_verifier_goes_on_identically(direction: Direction, steps: int, with_input: bool) -> None:
    rig, twin = (Rig(direction, with_input=with_input, warmup_steps=6) for _ in range(2))
    rig.run(steps)
    file = io.BytesIO()
    torch.save(rig.verifier.state_dict(), file)
    file.seek(0)
    twin.verifier.load_state_dict(torch.load(file, weights_only=True))
    twin.window, twin.steps, twin.verifier.fences = copy.deepcopy(rig.window), rig.steps, rig.verifier.fences
    assert_same_state(rig.verifier, twin.verifier)
    rig.stream, twin.stream = Honest(direction, 5), Honest(direction, 5)
    assert torch.equal(rig.run(4), twin.run(4))
    assert_same_state(rig.verifier, twin.verifier)


def storages(thing: object) -> Iterator[tuple[int, int]]:
    """Address and size of every tensor's memory that can be reached from an object."""
    if isinstance(thing, Tensor):
        yield thing.untyped_storage().data_ptr(), thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from storages(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from storages(value)
    elif hasattr(thing, "__dict__"):
        yield from storages(vars(thing))


def test_memory_does_not_grow_with_steps() -> None:
    rig, sizes = Rig(warmup_steps=2, with_input=True), []
    for _ in range(3):
        rig.run(8)
        sizes.append(sum(dict(storages(rig.verifier)).values()))
        state = rig.verifier.state_dict()
        regression = (CHANNELS + 1) * (CHANNELS + 1 + CHANNELS)
        moments = CHANNELS + CHANNELS * CHANNELS + 4 * 7
        assert sum(t.numel() for t in state.values()) == POSITIONS * CHANNELS + POSITIONS + moments + regression + 1
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("direction", Direction)
def test_the_state_of_a_wide_verifier_is_small_beside_its_signals(direction: Direction) -> None:
    samples, positions, channels = 8, 64, 256
    verifier = BoundaryVerifier(Boundary(1, direction), Verification())
    signal = torch.randn(samples, positions, channels, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        verifier.inspect(signal, NO, known_of(verifier, 0.9 * signal))
        verifier.learn(verifier.contribution(YES, NO))
    one_signal = signal.numel() * signal.element_size()
    assert sum(value.numel() * value.element_size() for value in verifier.state_dict().values()) <= one_signal
    assert sum(dict(storages(verifier)).values()) <= 4 * one_signal
    verifier.inspect(signal, NO, known_of(verifier, 0.9 * signal))  # In the middle of a step it keeps more.
    assert sum(dict(storages(verifier)).values()) <= 4 * one_signal
