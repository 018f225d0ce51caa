from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import BoundaryVerifier
from lightning_sentinel.verification.features import FEATURES, watched
from lightning_sentinel.verification.measurement import measure
from lightning_sentinel.verification.table import MAX_SCORE
from lightning_sentinel.verification.window import FenceRule, FenceWindow
from tests.verification.rigs import (
    CHANNELS,
    FLAGGED,
    LENGTH,
    NO,
    POSITIONS,
    SAMPLES,
    SCORE,
    TAINTED,
    WARMUP,
    WORST,
    YES,
    Honest,
    Rig,
    known_of,
)

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
    window = FenceWindow(1, 64, FenceRule(watched(Verification()), 0.01, True))
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
