from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Calibration
from lightning_sentinel.wiring import Wiring
from tests.verification.runs import MICRO_BATCHES, WARMUP, Draw, Run, normal
from tests.verification.tools import F, table_of


def test_windows_hold_what_was_honest_after_the_first_steps() -> None:
    run, rows = Run(Mesh(2, 4), warmup_steps=30, window=4096), []
    trend = np.full((2, F), np.nan, dtype="float32")
    for step in range(34):
        table = table_of(normal(run.mesh)(step, run.generator), calibration=run.calibration)
        honest = torch.rand(2, 4, MICRO_BATCHES, generator=run.generator) < 0.7
        assessment = run.assess(table)
        run.calibration.learn(table, honest, honest, ~honest, assessment, run.wiring)
        if step >= 10:
            rows.append((table.features - torch.from_numpy(trend)[:, None, None], assessment.centred(table.features), honest))
        for b, f in np.ndindex(2, F):
            median = np.median(table.features[b, ..., f][honest[b]].numpy())
            if step >= 30:  # From then on workers are compared, whatever was found honest.
                median = assessment.opinion[b, f].item()
            # The features of the first step are those of a step without references.
            trend[b, f] = [np.nan, median][step] if step < 2 else 0.9 * trend[b, f] + 0.1 * median
        np.testing.assert_allclose(run.calibration.trend.numpy(), trend, rtol=1e-4, atol=1e-6)
    for window, part in ((run.calibration.alone, 0), (run.calibration.among_peers, 1)):
        assert not window.settled.any(), "less than half of a window says too little of the shape of fences"
        for boundary in range(2):
            expected = torch.cat([row[part][boundary][row[2][boundary]] for row in rows])
            torch.testing.assert_close(window.values[boundary, : len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert window.values[boundary, len(expected) :].isnan().all()


def test_fences_are_refitted_every_few_steps() -> None:
    run = Run(Mesh(2, 4)).run(WARMUP - 1)
    assert run.calibration.alone.fences.upper.isinf().all()
    changes = []
    before = run.calibration.alone.scale  # which a fit replaces, whether the shape is settled or not
    for _ in range(9):
        run.run(1)
        changes.append(run.calibration.alone.scale is not before)
        before = run.calibration.alone.scale
    assert changes == [True, False, False, False] * 2 + [True]


@pytest.mark.parametrize("replicas", [3, 8])
def test_honest_workers_are_flagged_at_the_asked_rate_and_none_is_banned(replicas: int) -> None:
    run = Run(Mesh(3, replicas), ban_after=5, window=512).run(WARMUP + 100)
    assert run.ledger.banned == frozenset()
    signals = 100 * 4 * replicas * MICRO_BATCHES
    assert 0 < sum(run.flags[WARMUP:]) <= 0.01 * signals


def test_a_sender_on_one_side_is_found_by_its_sum() -> None:
    mesh, start = Mesh(2, 6), WARMUP + 60

    def biased(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        if step >= start:
            features[0, 4, :, 3] += 1.2
        return features

    run = Run(mesh, biased, ban_after=5, window=512).run(start + 40)
    assert run.ledger.banned == {Worker(0, 4)}


def features_with(mesh: Mesh, column: Callable[[torch.Generator, tuple[int, ...]], Tensor]) -> Draw:
    def draw(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        features[..., 2] = column(generator, tuple(features.shape[:3]))
        return features

    return draw


@pytest.mark.parametrize("replicas", [3, 8])
@pytest.mark.parametrize("kind", ["mostly zero", "skewed"])
def test_honest_workers_do_not_drift_because_a_feature_is_skewed(kind: str, replicas: int) -> None:
    mesh = Mesh(2, replicas)
    columns = {
        "mostly zero": lambda g, shape: (torch.rand(shape, generator=g) < 0.2) / 48.0,
        "skewed": lambda g, shape: (1.5 * torch.randn(shape, generator=g)).exp(),
    }
    run = Run(mesh, features_with(mesh, columns[kind]), ban_after=5, window=512).run(WARMUP + 120)
    assert run.ledger.banned == frozenset()


def test_a_drift_that_ended_is_forgotten() -> None:
    mesh, start = Mesh(2, 8), WARMUP + 60

    def odd_for_a_while(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        if start <= step < start + 15:
            features[0, 0, :, 0] += 1.2
        return features

    run = Run(mesh, odd_for_a_while, window=512).run(start + 120)
    assert Worker(0, 0) not in run.ledger.streaks


def test_a_change_of_the_training_makes_nobody_drift() -> None:
    mesh, start = Mesh(2, 3), WARMUP + 60

    def changes(step: int, generator: torch.Generator) -> Tensor:
        return normal(mesh)(step, generator) + (1.0 if step >= start else 0.0)

    run = Run(mesh, changes, ban_after=5, window=512).run(start + 60)
    assert run.ledger.banned == frozenset()


@pytest.mark.parametrize(("workers", "typical"), [(3, False), (5, True)])
def test_how_far_out_honest_workers_have_been_is_told_by_the_median_of_all(workers: int, typical: bool) -> None:
    mesh, nobody = Mesh(2, 8), torch.zeros(2, 8, MICRO_BATCHES, dtype=torch.bool)
    run = Run(mesh).run(WARMUP + 8)
    for worker in range(workers):  # One after the other, in one of four micro-batches: odd data.
        features = normal(mesh)(0, run.generator)
        features[1, worker, 0] += 6
        assessment, _ = run.step(table_of(features))
    assert assessment.score[1, worker, 0] > 1
    assert (assessment.typical[1] > 1) == typical and assessment.typical[0] < 1.5
    # It fades with every step in which the workers are seen, and not while they are not.
    features = normal(mesh)(0, run.generator)
    seen = run.assess(table_of(features)).recent[1]
    hidden = run.assess(table_of(features, ~nobody)).recent[1]
    assert torch.equal(hidden, assessment.recent[1])
    scores = run.assess(table_of(features)).score[1].amax(dim=1)
    torch.testing.assert_close(seen, torch.maximum(scores.clamp(max=5.0), 0.9 * assessment.recent[1]))
    # Whoever is banned counts no more.
    run.banned[1, 5:] = True
    assert run.assess(table_of(features, ~nobody)).typical[1] == assessment.recent[1, :5].sort().values[2]


def test_features_without_a_reference_do_not_become_fences() -> None:
    mesh = Mesh(2, 8)
    run = Run(mesh, lambda step, g: normal(mesh)(step, g) * (step > 0), ban_after=5, warmup_steps=1).run(12)
    assert run.ledger.banned == frozenset()


# --- State


def state_of(calibration: Calibration, boundaries: int) -> dict[int, dict[str, Tensor]]:
    return {boundary: calibration.state_of(boundary) for boundary in range(boundaries)}


@pytest.mark.parametrize("steps", [0, 5, WARMUP, WARMUP + 1, WARMUP + 9])
def test_a_loaded_calibration_goes_on_identically(steps: int) -> None:
    original, loaded = Run(Mesh(3, 4)).run(steps), Run(Mesh(3, 4))
    file = io.BytesIO()
    torch.save(state_of(original.calibration, 4), file)
    file.seek(0)
    for boundary, state in torch.load(file, weights_only=True).items():
        loaded.calibration.load_state_of(boundary, state)
    loaded.generator.manual_seed(3)
    original.generator.manual_seed(3)
    loaded.flags = list(original.flags)
    original.run(8)
    loaded.run(8)
    assert original.flags == loaded.flags
    for boundary in range(4):
        for name, value in original.calibration.state_of(boundary).items():
            # Windows begin at another place, so that sums over them are rounded otherwise.
            torch.testing.assert_close(loaded.calibration.state_of(boundary)[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_boundaries_are_loaded_one_by_one() -> None:
    original, loaded = Run(Mesh(3, 4)).run(WARMUP + 4), Run(Mesh(3, 4)).calibration
    loaded.load_state_of(2, original.calibration.state_of(2))
    for window, known in ((loaded.alone, original.calibration.alone), (loaded.among_peers, original.calibration.among_peers)):
        mine, theirs = (one.values[2, :, 0] for one in (window, known))
        assert mine[~mine.isnan()].sort().values.tolist() == theirs[~theirs.isnan()].sort().values.tolist()
        assert window.fences.upper[2].isfinite().all() and window.fences.upper[[0, 1, 3]].isinf().all()
    assert torch.equal(loaded.drift.sums[:, 2], original.calibration.drift.sums[:, 2]) and not loaded.drift.sums[:, :2].any()


def test_a_state_does_not_change_with_later_steps() -> None:
    run = Run(Mesh(2, 4)).run(WARMUP)
    state = run.calibration.state_of(0)
    before = {name: value.clone() for name, value in state.items()}
    run.run(3)
    for name, value in state.items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_the_state_of_one_boundary_takes_the_room_of_one_boundary() -> None:
    calibration = Calibration(Mesh(9, 4), Verification())
    file = io.BytesIO()
    state = calibration.state_of(0)
    torch.save(state, file)
    assert file.tell() <= 1.5 * sum(value.numel() * value.element_size() for value in state.values()) + 10_000


# --- The trend


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("by_step", [0.05, -0.2])
def test_a_steady_drift_of_all_features_makes_nobody_suspicious(by_step: float, replicas: int) -> None:
    # As many steps as the window would need to be a few standard deviations behind, were it not for the trend.
    mesh, steps = Mesh(3, replicas), 100
    run = Run(mesh, lambda step, g: normal(mesh)(step, g) + by_step * step, ban_after=5, window=256).run(WARMUP + steps)
    assert run.ledger.banned == frozenset()
    assert sum(run.flags[WARMUP:]) <= 0.01 * steps * len(mesh.boundaries) * replicas * MICRO_BATCHES
    behind = by_step * 10  # A moving average with a decay of 0.9 is ten steps behind what grows steadily.
    newest = by_step * (WARMUP + steps - 1)
    torch.testing.assert_close(run.calibration.trend.mean(), torch.tensor(newest + by_step - behind), rtol=0.05, atol=0.1)


def test_one_replica_that_leaves_the_trend_is_found() -> None:
    mesh, start = Mesh(3, 1), WARMUP + 40

    def jumps(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator) + 0.05 * step
        if step >= start:
            features[1, 0, :, 4] += 30
        return features

    run = Run(mesh, jumps, ban_after=5).run(start + 5)
    assert set(run.ledger.spared) == {Worker(mesh.boundaries[1].sender, 0)} and not run.ledger.banned


def test_boundaries_without_an_honest_signal_keep_their_trend() -> None:
    run = Run(Mesh(2, 3)).run(3)
    table = table_of(normal(run.mesh)(3, run.generator))
    honest = torch.ones(2, 3, MICRO_BATCHES, dtype=torch.bool)
    honest[1] = False
    before = run.calibration.trend.clone()
    run.calibration.learn(table, honest, honest, ~honest, run.assess(table), run.wiring)
    assert torch.equal(run.calibration.trend[1], before[1]) and not torch.equal(run.calibration.trend[0], before[0])


def test_the_trend_starts_where_there_is_something_to_measure() -> None:
    mesh = Mesh(2, 3)
    run = Run(mesh, lambda step, g: (0.1 * normal(mesh)(step, g) + 5.0) * (step > 0), window=64).run(WARMUP)
    assert run.calibration.alone.values.nanmean(dim=1).abs().max() < 0.2


def test_who_is_exonerated_is_forgotten_wherever_it_served() -> None:
    run = Run(Mesh(2, 3))
    wiring = dataclasses.replace(Wiring.of(run.mesh), serving=((1, 0, 2), (2, 0, 1)))
    for sums in (run.calibration.drift.sums, run.calibration.drift.outside):
        sums.fill_(17.0)
    assert (run.calibration.heights(wiring) == 17).all()
    run.calibration.forget_sums(torch.tensor([[True, False, False], [False, True, False]]), wiring)
    # Boundary 0 is that of the activations of stage 0, boundary 1 that of the gradients of stage 1.
    assert (run.calibration.drift.height == 0).tolist() == [[False, True, False], [True, False, False]]
    assert (run.calibration.heights(wiring) == 0).tolist() == [[True, False, False], [False, True, False]]
