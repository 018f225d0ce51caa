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
from lightning_sentinel.verification.distances import unit_directions
from lightning_sentinel.verification.features import FEATURES, temporal_features
from lightning_sentinel.verification.verifier import MAX_SCORE

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


class Rig:
    """A verifier and the honest stream that it sees."""

    def __init__(self, direction: Direction = Direction.ACTIVATION, seed: int = 0, **settings: Any) -> None:
        config = Verification(**{"warmup_steps": WARMUP, **settings})
        self.verifier = BoundaryVerifier(Boundary(0, direction), config)
        self.stream = Honest(direction, seed)

    def step(self, others: Callable[[BoundaryVerifier], None] | None = None) -> Tensor:
        """One step, in which all replicas are honest; returns the rows ``(replicas * micro_batches, len(COLUMNS))``."""
        self.stream.drift()
        rows = torch.cat(
            [
                self.verifier.inspect(torch.cat([self.stream.signal() for _ in range(REPLICAS)]), NOBODY).rows
                for _ in range(MICRO_BATCHES)
            ]
        )
        if others is not None:
            others(self.verifier)
        honest = rows[~rows[:, FLAGGED].bool()]
        self.verifier.learn(self.verifier.contribution(NOBODY), honest[:, : len(FEATURES)])
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
        twin.verifier = copy.deepcopy(original.verifier)
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
        assert not rig.verifier.warmed_up
        for attack in ATTACKS.values():
            assert not copy.deepcopy(rig.verifier).inspect(attack(rig.stream.signal(), rig.stream), NO).flagged, step
        assert not rig.step()[:, FLAGGED].any()
    assert rig.verifier.warmed_up


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
    mean = signal.mean(dim=0)
    directions = unit_directions(CHANNELS, 16, verifier._directions_seed)
    features = temporal_features(mean, verifier.momentum.value, directions).numpy()
    np.testing.assert_allclose(row[: len(FEATURES)].numpy(), features, rtol=1e-5)
    lower, centre, upper = (bound.numpy() for bound in (verifier.fences.lower, verifier.fences.centre, verifier.fences.upper))
    scores = np.where(features > centre, (features - centre) / (upper - centre), (centre - features) / (centre - lower))
    assert row[SCORE].item() == pytest.approx(scores.max(), rel=1e-4)
    assert row[WORST].item() == scores.argmax()
    assert row[FLAGGED].item() == float(scores.max() > 1)
    assert (row[TAINTED], row[LENGTH]) == (0, POSITIONS)


def test_directions_differ_between_boundaries_and_follow_the_seed() -> None:
    def directions(boundary: Boundary, seed: int) -> Tensor:
        rig = Rig(seed=seed)
        rig.verifier = BoundaryVerifier(boundary, Verification(seed=seed))
        rig.run(2)
        return rig.verifier._directions

    boundaries = [Boundary(index, direction) for index in range(3) for direction in Direction]
    drawn = [directions(boundary, seed) for seed in (0, 1) for boundary in boundaries]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert not torch.allclose(one, other)
    assert torch.equal(directions(boundaries[0], 0), drawn[0])


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_a_secret_seed_may_be_as_long_as_an_integer(seed: int) -> None:
    verifier, stream = BoundaryVerifier(Boundary(0, Direction.ACTIVATION), Verification(seed=seed)), Honest(Direction.ACTIVATION, 0)
    for _ in range(2):
        rows = verifier.inspect(stream.signal(), NO).rows
        verifier.learn(verifier.contribution(NO), rows[:, : len(FEATURES)])
    assert rows.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 8), (4, 8, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_shape_and_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    verifier, generator = BoundaryVerifier(Boundary(0, Direction.ACTIVATION), Verification(warmup_steps=6)), torch.Generator()
    generator.manual_seed(0)
    for _ in range(12):
        rows = [verifier.inspect(torch.randn(shape, generator=generator).add(2).to(dtype), NO).rows for _ in range(4)]
        verifier.learn(verifier.contribution(NO), torch.cat(rows)[:, : len(FEATURES)])
    signal = torch.full(shape, -2.0, dtype=dtype)
    assert verifier.inspect(signal, NO).flagged
    stand_in = verifier.substitute(signal)
    assert (stand_in.shape, stand_in.dtype) == (signal.shape, dtype)


def test_inspection_leaves_the_signal_and_its_graph_alone() -> None:
    rig = Rig()
    signal = rig.stream.signal().requires_grad_()
    before = signal.detach().clone()
    rows, flagged = rig.verifier.inspect(signal, NO)
    assert not rows.requires_grad and not flagged.requires_grad
    assert torch.equal(signal, before) and signal.grad is None


# --- What is learned


def test_the_momentum_is_the_average_of_the_honest_means() -> None:
    rig = Rig(beta_activation=0.7)
    expected = None
    for _ in range(8):
        signals = [rig.stream.signal() for _ in range(6)]
        for micro_batch in (signals[:3], signals[3:]):
            rig.verifier.inspect(torch.cat(micro_batch), torch.tensor([False] * 3))
        rig.verifier.learn(rig.verifier.contribution(torch.tensor([False] * 3)), torch.zeros(0, len(FEATURES)))
        mean = np.mean([signal.double().numpy().mean(axis=0) for signal in signals], axis=0)
        expected = mean if expected is None else 0.7 * expected + 0.3 * mean
    np.testing.assert_allclose(rig.verifier.momentum.value.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", Direction)
def test_each_direction_has_its_decay(direction: Direction) -> None:
    verifier = Rig(direction, beta_activation=0.6, beta_gradient=0.3).verifier
    assert verifier.momentum.beta == {Direction.ACTIVATION: 0.6, Direction.GRADIENT: 0.3}[direction]


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
    near = [rig.verifier.momentum.value + torch.zeros(SAMPLES, 1, 1) + 0.1 * rig.stream.noise(SAMPLES, POSITIONS, CHANNELS)]
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
        step = verifier.contribution(torch.tensor([replica in cleared for replica in range(REPLICAS)]))
        np.testing.assert_allclose(step.total.numpy(), np.sum(kept, axis=0), rtol=1e-4, atol=1e-4)
        assert step.count.tolist() == [len(kept)] * POSITIONS
        return step.total.numpy(), step.count.tolist()

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
    assert rig.verifier.contribution(torch.tensor([False, False])).total.isfinite().all()


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

    together, apart, generator = verifier(), [verifier() for _ in range(3)], torch.Generator().manual_seed(4)
    seen = torch.zeros(3, dtype=torch.long)
    for step in range(20):
        honest = []
        for micro_batch in range(MICRO_BATCHES):
            signals = one_of_each(shape, dtype, generator, step, micro_batch)
            tainted = torch.tensor([False, False, step % 5 == 3])
            rows, flagged = together.inspect(torch.cat(signals), tainted)
            singles = [one.inspect(signals[sender], tainted[sender : sender + 1]) for sender, one in enumerate(apart)]
            assert torch.equal(rows, torch.cat([single.rows for single in singles]))
            assert torch.equal(flagged, torch.cat([single.flagged for single in singles]))
            honest.append(rows[~flagged & ~tainted, : len(FEATURES)])
            seen += flagged
        for sender, one in enumerate(apart):
            for mine, its in zip(together._kept, one._kept):
                assert torch.equal(mine.total[sender], its.total[0]) and torch.equal(mine.count[sender], its.count[0])
        cleared = torch.tensor([True, step % 8 == 5, False])
        whole = together.contribution(cleared)
        parts = [one.contribution(cleared[sender : sender + 1]) for sender, one in enumerate(apart)]
        summed = parts[0] + parts[1] + parts[2]
        assert torch.equal(whole.total, summed.total) and torch.equal(whole.count, summed.count)
        together.learn(whole, torch.cat(honest))
        for one in apart:
            one.learn(summed, torch.cat(honest))
            assert_same_state(together, one)
    assert together.warmed_up and seen[1] >= 8


def test_a_contribution_is_asked_for_once() -> None:
    rig = Rig()
    rig.step()
    with pytest.raises(RuntimeError, match=r"stage0/activation.*nothing to contribute"):
        rig.verifier.contribution(NOBODY)
    rig.verifier.inspect(rig.stream.signal(), NO)
    assert rig.verifier.contribution(NO).count.tolist() == [1] * POSITIONS


def test_the_first_steps_of_the_momentum_stay_out_of_the_window() -> None:
    rig = Rig(warmup_steps=50)
    rig.run(10)
    assert len(rig.verifier.window) == 0
    rows = rig.step()
    assert torch.equal(rig.verifier.window, rows[:, : len(FEATURES)])


def test_the_window_holds_the_latest_values() -> None:
    rig = Rig(warmup_steps=2, window=20)
    rows = rig.run(9)
    honest = rows[1:].flatten(0, 1)
    honest = honest[~honest[:, FLAGGED].bool()]
    assert torch.equal(rig.verifier.window, honest[-20:, : len(FEATURES)])


@pytest.mark.parametrize("longer", [_tainted, _non_finite, _far_out])
def test_positions_that_nobody_honest_sent_are_not_compared(rigs: Callable[..., Rig], longer: Callable[..., None]) -> None:
    # Sequences vary in length. A longer one that was tainted or flagged must not leave a momentum of zero behind.
    rig, positions = rigs(), 2 * POSITIONS
    honest = torch.cat((rig.stream.mean, rig.stream.mean)) + rig.stream.noise(SAMPLES, positions, CHANNELS)
    before = rig.score(honest)
    assert before <= 1
    longer(rig.verifier, positions)
    rig.verifier.contribution(NOBODY)
    rig.verifier.learn(None, torch.zeros(0, len(FEATURES)))
    assert rig.score(honest) == pytest.approx(before, rel=1e-3)


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
            assert torch.equal(stand_in, rig.verifier.momentum.value.expand(SAMPLES, -1, -1))


def test_the_stand_in_of_an_activation_is_not_flagged_as_too_far(rigs: Callable[..., Rig]) -> None:
    rig = rigs(Direction.ACTIVATION, "paper")
    assert not rig.verifier.inspect(rig.verifier.substitute(rig.stream.signal()), NO).flagged


# --- State


def tensors_of(verifier: BoundaryVerifier) -> dict[str, Tensor]:
    state = dict(verifier.state_dict())
    return state | {f"fences.{name}": getattr(verifier.fences, name) for name in ("lower", "centre", "upper")}


def assert_same_state(one: BoundaryVerifier, other: BoundaryVerifier) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("steps", [0, 1, 30, WARMUP, WARMUP + 5])
def test_a_loaded_verifier_goes_on_identically(direction: Direction, steps: int) -> None:
    rig, twin = Rig(direction), Rig(direction)
    rig.run(steps)
    file = io.BytesIO()
    torch.save(rig.verifier.state_dict(), file)
    file.seek(0)
    twin.verifier.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(rig.verifier, twin.verifier)
    rig.stream, twin.stream = Honest(direction, 5), Honest(direction, 5)
    assert torch.equal(rig.run(6), twin.run(6))
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
    window, projections, f = 24, 4, len(FEATURES)
    rig = Rig(warmup_steps=2, window=window, projections=projections)
    sizes = []
    for _ in range(3):
        rig.run(30)
        sizes.append(sum(dict(storages(rig.verifier)).values()))
        state = rig.verifier.state_dict()
        assert sum(t.numel() for t in state.values()) == POSITIONS * CHANNELS + POSITIONS + window * f + 1
    momentum = POSITIONS * CHANNELS * 4 + POSITIONS
    # The window may share memory with the rows that it last let go, and the centre of the fences with the quartiles.
    most = momentum + (window + REPLICAS * MICRO_BATCHES) * f * 4 + CHANNELS * projections * 4 + 6 * f * 4
    assert sizes[0] == pytest.approx(sizes[2], abs=REPLICAS * MICRO_BATCHES * f * 4)
    assert max(sizes) <= most


# --- No waiting for a device


class _Synchronised(AssertionError):
    """Something read a value back."""


class _NoReadback(TorchDispatchMode):
    """Fails at operators whose result, or the shape of it, depends on values."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")

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
    ],
)
def test_the_trap_closes(reads: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_Synchronised), no_readback(monkeypatch):
        reads(torch.ones(3))


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("steps", [0, 1, WARMUP + 5])
def test_a_receipt_reads_nothing_back(
    rigs: Callable[..., Rig], direction: Direction, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigs(direction) if steps > WARMUP else Rig(direction)
    if steps <= WARMUP:
        rig.run(steps)
    honest = rig.stream.signal()
    signals = [torch.cat((honest, honest * 100)), torch.cat((honest * math.nan, honest))]
    taints, cleared = [torch.tensor([False, False]), torch.tensor([False, True])], torch.tensor([True, False])
    results: list[Inspection] = []
    with no_readback(monkeypatch):
        for signal, tainted in zip(signals, taints):
            results.append(rig.verifier.inspect(signal, tainted))
            rig.verifier.substitute(signal)
        rig.verifier.contribution(cleared)
    assert torch.cat([result.flagged for result in results]).tolist() == [False, steps > WARMUP, True, False]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(("device", "mode"), [("cpu", FakeTensorMode), ("meta", nullcontext)], ids=["fake", "meta"])
def test_a_receipt_needs_no_values_at_all(device: str, mode: Callable[[], Any], direction: Direction) -> None:
    # Neither kind of tensor has values, so that any branch on one raises; on the meta device mixing it with the host does, too.
    with mode():
        verifier = BoundaryVerifier(Boundary(0, direction), Verification(warmup_steps=1), device)
        for _ in range(4):
            for _ in range(MICRO_BATCHES):
                signals = torch.empty(2 * SAMPLES, POSITIONS, CHANNELS, device=device)
                tainted = torch.empty(2, dtype=torch.bool, device=device)
                rows, flagged = verifier.inspect(signals, tainted)
                assert (rows.shape, flagged.shape, flagged.dtype) == ((2, len(COLUMNS)), (2,), torch.bool)
                assert rows.device.type == flagged.device.type == device
                assert verifier.substitute(signals).device == signals.device
            verifier.learn(verifier.contribution(torch.empty(2, dtype=torch.bool, device=device)), torch.rand(8, len(FEATURES)))
        assert verifier.warmed_up and len(verifier.window) == 24
