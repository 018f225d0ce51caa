from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import COLUMNS, BoundaryVerifier, Inspection
from lightning_sentinel.verification.features import FEATURES, watched
from lightning_sentinel.verification.fences import Fences
from lightning_sentinel.verification.measurement import measure
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.window import FenceWindow

SAMPLES, POSITIONS, CHANNELS = 4, 6, 8
REPLICAS, MICRO_BATCHES = 4, 2
WARMUP = 50
YES, NO = torch.tensor([True]), torch.tensor([False])
NOBODY = torch.zeros(REPLICAS, dtype=torch.bool)
SCORE, WORST, FLAGGED, TAINTED, LENGTH = (COLUMNS.index(name) for name in ("score", "worst", "flagged", "tainted", "positions"))


class Honest:
    """Gaussian samples around a mean that drifts; activations have a strong mean, gradients are mostly noise."""

    def __init__(self, direction: Direction, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        strength = 2.0 if direction is Direction.ACTIVATION else 0.02
        self.mean = self.noise(POSITIONS, CHANNELS) * strength

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def drift(self) -> None:
        self.mean = self.mean + 0.01 * self.noise(POSITIONS, CHANNELS)

    def signal(self) -> Tensor:
        return self.mean + self.noise(SAMPLES, POSITIONS, CHANNELS)


def known_of(verifier: BoundaryVerifier, received: Tensor) -> Projection:
    """What its neighbours tell a verifier of what a sender had received."""
    return SecretDirections(verifier.boundary, Verification(), received.device).project(received)


class Rig:
    """A verifier with the fences of a calibration that sees the same honest stream."""

    def __init__(
        self, direction: Direction = Direction.ACTIVATION, seed: int = 0, with_input: bool = False, **settings: Any
    ) -> None:
        config = Verification(**{"warmup_steps": WARMUP, **settings})
        # Of a mesh with a stage before and one behind, so that its senders have received something.
        self.verifier = BoundaryVerifier(Boundary(1 if direction is Direction.ACTIVATION else 0, direction), config)
        self.window = FenceWindow(1, config.window, watched(config), config.false_positive_rate, config.method == "sentinel")
        self.stream, self.with_input, self.warmup, self.steps = Honest(direction, seed), with_input, config.warmup_steps, 0

    @property
    def warmed_up(self) -> bool:
        return self.steps >= self.warmup

    def received(self, signal: Tensor) -> Projection | None:
        """What the sender of an honest signal had received: the signal is a little more than that."""
        return known_of(self.verifier, 0.9 * signal) if self.with_input else None

    def step(self, others: Callable[[BoundaryVerifier], None] | None = None) -> Tensor:
        """One step, in which all replicas are honest; returns the rows ``(replicas * micro_batches, len(COLUMNS))``."""
        self.stream.drift()
        signals = [torch.cat([self.stream.signal() for _ in range(REPLICAS)]) for _ in range(MICRO_BATCHES)]
        rows = torch.cat([self.verifier.inspect(signal, NOBODY, self.received(signal)).rows for signal in signals])
        if others is not None:
            others(self.verifier)
        self.verifier.learn(self.verifier.contribution(~NOBODY, NOBODY))
        if self.steps >= min(10, self.warmup // 2):
            self.window.add(rows[None, :, : len(FEATURES)], ~rows[None, :, FLAGGED].bool())
        self.steps += 1
        if self.warmed_up:
            self.window.fit()
            self.verifier.fences = self.window.fences.of(0)
        return rows

    def run(self, steps: int) -> Tensor:
        rows = torch.empty(steps, REPLICAS * MICRO_BATCHES, len(COLUMNS))
        for step in range(steps):
            rows[step] = self.step()
        return rows

    def score(self, signal: Tensor) -> float:
        """Of a signal that leaves no trace."""
        return copy.deepcopy(self.verifier).inspect(signal, NO).rows[0, SCORE].item()


def inspect_one(verifier: BoundaryVerifier, sender: int, signal: Tensor, tainted: Tensor = NO) -> tuple[Tensor, Tensor]:
    """What is said of one sender's signal in a micro-batch in which those of all others are tainted: its row, its verdict."""
    signals, taints = torch.zeros(REPLICAS, *signal.shape), torch.ones(REPLICAS, dtype=torch.bool)
    signals[sender], taints[sender] = signal, tainted
    rows, flagged = verifier.inspect(signals.flatten(0, 1), taints)
    assert not flagged[taints].any()
    return rows[sender], flagged[sender]


@pytest.fixture(scope="module")
def rigs() -> Callable[[Direction, str], Rig]:
    """Rigs after their warm-up; each call gives a copy."""
    known: dict[tuple[Direction, str], Rig] = {}

    def rig(direction: Direction = Direction.ACTIVATION, method: str = "sentinel") -> Rig:
        if (direction, method) not in known:
            known[direction, method] = Rig(direction, method=method)
            known[direction, method].run(WARMUP + 5)
        original = known[direction, method]
        twin = copy.copy(original)
        twin.verifier, twin.window = copy.deepcopy(original.verifier), copy.deepcopy(original.window)
        twin.stream = copy.copy(original.stream)
        twin.stream.generator = torch.Generator().manual_seed(17)
        return twin

    return rig


ATTACKS: dict[str, Callable[[Tensor, Honest], Tensor]] = {
    "zeros": lambda signal, _: torch.zeros_like(signal),
    "negated": lambda signal, _: -signal,
    "tenfold": lambda signal, _: 10 * signal,
    "tenth": lambda signal, _: 0.1 * signal,
    "ones": lambda signal, _: torch.ones_like(signal),
    "random": lambda signal, stream: 3 * stream.noise(*signal.shape),
    "random sign": lambda signal, stream: signal * stream.noise(*signal.shape).sign(),
}


# --- What is flagged


@pytest.mark.parametrize("direction", Direction)
def test_nobody_is_flagged_in_the_warm_up(direction: Direction) -> None:
    rig = Rig(direction, warmup_steps=12)
    for step in range(12):
        assert not rig.warmed_up
        for attack in ATTACKS.values():
            assert not copy.deepcopy(rig.verifier).inspect(attack(rig.stream.signal(), rig.stream), NO).flagged, step
        assert not rig.step()[:, FLAGGED].any()
    assert rig.warmed_up


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("warm", [0, 3, WARMUP + 5])
def test_what_is_not_finite_is_flagged_at_any_time(rigs: Callable[..., Rig], warm: int, value: float) -> None:
    rig = rigs() if warm > WARMUP else Rig()
    if warm <= WARMUP:
        rig.run(warm)
    signal = rig.stream.signal()
    signal[2, 3, 4] = value
    (row,), flagged = rig.verifier.inspect(signal, NO)
    assert flagged
    assert (row[SCORE], row[WORST], row[FLAGGED]) == (MAX_SCORE, -1, 1)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("method", ["sentinel", "paper"])
def test_honest_signals_are_rarely_flagged(rigs: Callable[..., Rig], direction: Direction, method: str) -> None:
    # The configured rate is 1 %; the micro-batches of a step share the momentum's error, and the fences a window of 512.
    flagged = rigs(direction, method).run(60)[..., FLAGGED]
    assert flagged.mean() <= 0.03


@pytest.mark.parametrize("method", ["sentinel", "paper"])
@pytest.mark.parametrize("name", ATTACKS)
def test_tampered_activations_are_flagged(rigs: Callable[..., Rig], name: str, method: str) -> None:
    rig = rigs(Direction.ACTIVATION, method)
    for _ in range(10):
        (row,), flagged = rig.verifier.inspect(ATTACKS[name](rig.stream.signal(), rig.stream), NO)
        assert flagged and row[SCORE] > 1


@pytest.mark.parametrize("name", ["tenfold", "ones", "random"])
def test_gradients_too_far_from_their_momentum_are_flagged(rigs: Callable[..., Rig], name: str) -> None:
    rig = rigs(Direction.GRADIENT)
    assert all(rig.verifier.inspect(ATTACKS[name](rig.stream.signal(), rig.stream), NO).flagged for _ in range(10))


@pytest.mark.parametrize("name", ["zeros", "tenth"])
def test_only_two_sided_fences_see_gradients_too_close_to_their_momentum(rigs: Callable[..., Rig], name: str) -> None:
    for method, seen in (("sentinel", True), ("paper", False)):
        rig = rigs(Direction.GRADIENT, method)
        verdicts = [rig.verifier.inspect(ATTACKS[name](rig.stream.signal(), rig.stream), NO).flagged.item() for _ in range(10)]
        assert verdicts == [seen] * 10, method


# --- What a row says


def test_a_row_holds_the_features_and_the_score_of_the_feature_furthest_out(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    signal, verifier = 1.3 * rig.stream.signal(), rig.verifier
    (row,) = verifier.inspect(signal, NO).rows
    features = measure(signal, 1, None, verifier.references, verifier._secret).features[0].numpy()
    np.testing.assert_allclose(row[: len(FEATURES)].numpy(), features, rtol=1e-5)
    lower, centre, upper = (bound.numpy() for bound in (verifier.fences.lower, verifier.fences.centre, verifier.fences.upper))
    up, down = features - centre, centre - features
    scores = np.where(up >= 0, up / (upper - centre + 1e-12), down / (centre - lower + 1e-12))
    assert row[SCORE].item() == pytest.approx(scores.max(), rel=1e-3)
    assert row[WORST].item() == scores.argmax()
    assert row[FLAGGED].item() == float(scores.max() > 1)
    assert (row[TAINTED], row[LENGTH]) == (0, POSITIONS)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", ["negated", "permuted", "replayed", "zeros"])
def test_what_does_not_follow_from_its_input_is_flagged(direction: Direction, name: str) -> None:
    rig = Rig(direction, with_input=True, warmup_steps=20)
    rig.run(25)
    for _ in range(5):
        signal = rig.stream.signal()
        received = rig.received(signal)
        tampered = {"negated": -signal, "permuted": signal.roll(1, 0), "replayed": rig.stream.signal(), "zeros": 0 * signal}
        assert copy.deepcopy(rig.verifier).inspect(tampered[name], NO, received).flagged


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_shape_and_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    verifier, generator = BoundaryVerifier(Boundary(0, Direction.ACTIVATION), Verification(warmup_steps=6)), torch.Generator()
    generator.manual_seed(0)
    kept: list[Tensor] = []
    for _ in range(12):
        rows = [verifier.inspect(torch.randn(shape, generator=generator).add(2).to(dtype), NO).rows for _ in range(4)]
        verifier.learn(verifier.contribution(YES, NO))
        kept += [row[:, : len(FEATURES)] for row in rows]
    window = FenceWindow(1, 64, watched(Verification()), 0.01, True)
    values = torch.cat(kept)[16:]
    window.add(values[None], torch.ones(1, len(values), dtype=torch.bool))
    window.fit()
    verifier.fences = window.fences.of(0)
    signal = torch.full(shape, -2.0, dtype=dtype)
    assert values.isfinite().all() and verifier.inspect(signal, NO).flagged
    stand_in = verifier.substitute(signal)
    assert (stand_in.shape, stand_in.dtype) == (signal.shape, dtype)


def test_inspection_leaves_the_signal_and_its_graph_alone() -> None:
    rig = Rig()
    signal = rig.stream.signal().requires_grad_()
    before = signal.detach().clone()
    rows, flagged = rig.verifier.inspect(signal, NO)
    assert not rows.requires_grad and not flagged.requires_grad
    assert torch.equal(signal, before) and signal.grad is None


def test_verdicts_may_take_part_in_a_backward_pass() -> None:
    rig = Rig()
    signal = rig.stream.signal().requires_grad_()
    for _ in range(2):  # The first has nothing to be compared with.
        rows, flagged = rig.verifier.inspect(signal, NO, rig.received(signal))
        (torch.where(flagged, 0 * signal, signal) * rows[0, SCORE]).sum().backward()
        rig.verifier.learn(rig.verifier.contribution(YES, NO))
    assert not known_of(rig.verifier, signal).values.requires_grad


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
    window, seen = FenceWindow(1, 128, watched(Verification()), 0.01, True), torch.zeros(3, dtype=torch.long)
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
        summed = parts[0] + parts[1] + parts[2]
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


# --- Stand-ins


def test_stand_ins() -> None:
    signal = torch.full((SAMPLES, POSITIONS, CHANNELS), math.nan)
    for direction in Direction:
        rig = Rig(direction)
        assert torch.equal(rig.verifier.substitute(signal), torch.zeros_like(signal))
        rig.run(3)
        stand_in = rig.verifier.substitute(signal)
        if direction is Direction.GRADIENT:
            assert not stand_in.any()
        else:
            assert torch.equal(stand_in, rig.verifier.references.momentum.value.expand(SAMPLES, -1, -1))


def test_the_stand_in_of_an_activation_is_not_flagged_as_too_far(rigs: Callable[..., Rig]) -> None:
    rig = rigs(Direction.ACTIVATION, "paper")
    assert not rig.verifier.inspect(rig.verifier.substitute(rig.stream.signal()), NO).flagged


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


# --- No waiting for a device


class _Synchronised(AssertionError):
    """Something read a value back."""


class _NoReadback(TorchDispatchMode):
    """Fails at operators whose result, or the shape of it, depends on values, and where values of the host become a tensor."""

    forbidden = ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masked or name in self.forbidden:
            raise _Synchronised(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_readback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the host would wait for a device: at the operators, and at the methods that need none."""

    def refuse(*_: Any, **__: Any) -> None:
        raise _Synchronised

    with monkeypatch.context() as patch, _NoReadback():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "reads",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: float(t[0]),
        lambda t: t[t > 0],
        lambda t: t.numpy(),
        lambda t: torch.equal(t, t),
        lambda t: t[[0, 2]],
        lambda t: t + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_the_trap_closes(reads: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_Synchronised), no_readback(monkeypatch):
        reads(torch.ones(3))


@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_a_receipt_and_what_it_teaches_read_nothing_back(
    direction: Direction, steps: int, with_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(direction, with_input=with_input, warmup_steps=16)
    rig.run(steps)
    honest = rig.stream.signal()
    signals = [torch.cat((honest, honest * 100)), torch.cat((honest * math.nan, honest))]
    inputs = torch.cat((0.9 * honest, 0.9 * honest))
    taints, cleared = [torch.tensor([False, False]), torch.tensor([False, True])], torch.tensor([True, False])
    results: list[Inspection] = []
    with no_readback(monkeypatch):
        for signal, tainted in zip(signals, taints):
            received = known_of(rig.verifier, inputs) if with_input else None
            results.append(rig.verifier.inspect(signal, tainted, received))
            rig.verifier.substitute(signal)
        rig.verifier.learn(rig.verifier.contribution(cleared, cleared))
    flagged = torch.cat([result.flagged for result in results])
    assert flagged[2] and not flagged[3] and flagged[1] == (steps > 16)


@pytest.mark.parametrize("method", ["sentinel", "paper"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(("device", "mode"), [("cpu", FakeTensorMode), ("meta", nullcontext)], ids=["fake", "meta"])
def test_a_receipt_needs_no_values_at_all(device: str, mode: Callable[[], Any], direction: Direction, method: Any) -> None:
    # Neither kind of tensor has values, so that any branch on one raises; on the meta device mixing it with the host does, too.
    with mode():
        verifier = BoundaryVerifier(Boundary(0, direction), Verification(method=method), device)
        for _ in range(3):
            for _ in range(MICRO_BATCHES):
                signals = torch.empty(2 * SAMPLES, POSITIONS, CHANNELS, device=device)
                tainted = torch.empty(2, dtype=torch.bool, device=device)
                rows, flagged = verifier.inspect(signals, tainted, known_of(verifier, signals))
                assert (rows.shape, flagged.shape, flagged.dtype) == ((2, len(COLUMNS)), (2,), torch.bool)
                assert rows.device.type == flagged.device.type == device
                assert verifier.substitute(signals).device == signals.device
            chosen = torch.empty(2, dtype=torch.bool, device=device)
            verifier.learn(verifier.contribution(chosen, chosen))
            verifier.fences = Fences.open(len(FEATURES)).to(device)
        updates = verifier.references.updates
        assert updates is not None and updates.device.type == device and updates.shape == ()
