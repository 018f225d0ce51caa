from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification import COLUMNS
from lightning_sentinel.verification.table import MAX_SCORE
from tests.verification.runs import MICRO_BATCHES, WARMUP, Run, normal
from tests.verification.tools import F, table_of


def centre_by_hand(features: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Less the median of the lanes' medians."""
    centred = np.empty_like(features)
    for b, f in np.ndindex(features.shape[0], features.shape[3]):
        lanes = [np.median(values[use]) for values, use in zip(features[b, ..., f], kept[b]) if use.any()]
        centred[b, ..., f] = features[b, ..., f] - np.median(np.array(lanes))
    return centred


def test_signals_are_compared_with_the_median_of_those_that_are_in_line() -> None:
    mesh = Mesh(3, 7)
    run = Run(mesh).run(WARMUP + 8)
    features = normal(mesh, 3)(0, run.generator)
    # At the last boundary on the way: behind what is out of line nobody votes.
    features[2, 2] += 50
    features[2, 5, 1] -= 50
    table = table_of(features, calibration=run.calibration)
    assessment = run.assess(table)
    assert assessment.by_peers.all() and assessment.valid.all()
    fences = run.calibration.among_peers.fences

    def scores(centred: np.ndarray) -> np.ndarray:
        return np.stack([fences.of(b).scores(torch.from_numpy(centred[b])).numpy() for b in range(len(centred))])

    everybody = np.ones(features.shape[:3], dtype=bool)
    kept = scores(centre_by_hand(features.numpy(), everybody)).max(axis=3) <= 1
    expected = centre_by_hand(features.numpy(), kept)
    np.testing.assert_allclose(assessment.centred(features).numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(assessment.score.numpy(), scores(expected).max(axis=3), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(assessment.worst.numpy(), scores(expected).argmax(axis=3))
    assert (assessment.score[2, 2] > 1).all() and assessment.score[2, 5, 1] > 1
    assert (assessment.score > 1).sum() <= 3 + 1 + 4


def test_what_all_replicas_do_alike_does_not_count() -> None:
    mesh = Mesh(3, 4)
    run = Run(mesh).run(WARMUP + 4)
    features = normal(mesh)(0, run.generator)
    one, other = (run.assess(table_of(features + shift)) for shift in (0.0, 30.0))
    torch.testing.assert_close(one.score, other.score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 3, WARMUP - 1])
def test_nobody_is_compared_before_the_warm_up_is_over(steps: int) -> None:
    run = Run(Mesh(3, 5)).run(steps)
    table = table_of(1000 * normal(run.mesh)(0, run.generator), calibration=run.calibration)
    assessment = run.assess(table)
    assert not run.calibration.warmed_up and not assessment.by_peers.any() and not (assessment.score > 1).any()


@pytest.mark.parametrize(("settings", "replicas"), [({"method": "paper"}, 8), ({}, 3), ({}, 1)])
def test_where_there_is_nobody_to_be_compared_with_the_scores_at_receipt_stand(settings: dict[str, Any], replicas: int) -> None:
    run = Run(Mesh(3, replicas), **settings).run(WARMUP + 4)
    table = table_of(2 * normal(run.mesh)(0, run.generator), calibration=run.calibration)
    assessment = run.assess(table)
    assert not assessment.by_peers.any()
    assert torch.equal(assessment.score, table.column("score")) and torch.equal(assessment.worst, table.column("worst"))


def test_lanes_that_are_left_out_and_tainted_signals_have_no_say() -> None:
    mesh = Mesh(3, 8)
    run = Run(mesh).run(WARMUP + 4)
    features, tainted = normal(mesh)(0, run.generator), torch.zeros(4, 8, MICRO_BATCHES, dtype=torch.bool)
    live = torch.tensor([True] * 7 + [False])
    tainted[2, :2, 1:] = True
    wild = features.clone()
    wild[:, 7] = 1e4
    wild[2, :2, 1:] = torch.nan
    run.wiring = dataclasses.replace(run.wiring, live=tuple(live.tolist()))
    one, other = (run.assess(table_of(f, tainted)) for f in (features, wild))
    valid = ~tainted & live[:, None]
    assert torch.equal(one.valid, valid) and torch.equal(other.valid, valid)
    assert one.by_peers.all() and torch.equal(one.score[valid], other.score[valid])
    assert torch.equal(one.centre, other.centre)


def test_what_is_not_finite_has_the_highest_score_and_moves_nobody_else() -> None:
    mesh = Mesh(3, 5)
    run = Run(mesh).run(WARMUP + 4)
    features = normal(mesh)(0, run.generator)
    broken = table_of(features.clone())
    broken.rows[1, 2, 0, :F], broken.rows[1, 2, 0, COLUMNS.index("worst")] = torch.nan, -1
    assessment = run.assess(broken)
    assert (assessment.score[1, 2, 0], assessment.worst[1, 2, 0]) == (MAX_SCORE, -1)
    rest = torch.ones(4, 5, MICRO_BATCHES, dtype=torch.bool)
    rest[1, 2, 0] = False
    assert assessment.score[rest].isfinite().all() and assessment.centre.isfinite().all()
    assert torch.equal(assessment.score[0], run.assess(table_of(features)).score[0])


def test_nobody_votes_behind_what_is_out_of_line() -> None:
    # Three of eight lie where stage 1 sends activations; what the lanes' last stages make of it is not theirs.
    mesh = Mesh(3, 8)
    run = Run(mesh).run(WARMUP + 8)
    features = normal(mesh)(0, run.generator)
    features[1, :3] += 50
    features[[2, 3], :3] += 9
    features[3, 3:5] -= 9  # Two more at the last stage: with the three there would be a majority.
    assessment = run.assess(table_of(features))
    assert assessment.by_peers.all() and assessment.certain.tolist() == [True, True, False, False]
    assert (assessment.score[3, 3:5] > 1).all() and (assessment.score[3, 5:] < 1.5).all()
    assert assessment.centre[3].abs().max() < 2


def test_who_cannot_be_verified_votes_with_what_it_sent_last() -> None:
    mesh, tainted = Mesh(2, 8), torch.zeros(2, 8, MICRO_BATCHES, dtype=torch.bool)
    run = Run(mesh, lambda step, g: normal(mesh)(step, g) + 0.2 * step).run(WARMUP + 8)
    tainted[1, 3:] = True
    features = normal(mesh)(0, run.generator) + 0.2 * (WARMUP + 8)
    features[1, :2] += 9  # Two of the three that are left.
    assessment = run.assess(table_of(features, tainted))
    assert assessment.by_peers.all() and assessment.quorum.tolist() == [True, False]
    assert (assessment.score[1, :2] > 1.5).all() and (assessment.score[1, 2] < 1).all()
    run.banned[1, 3:6] = True  # Whoever is banned has no vote any more.
    assert run.assess(table_of(features, tainted)).by_peers.tolist() == [True, True]
    run.banned[1, 6] = True
    assert run.assess(table_of(features, tainted)).by_peers.tolist() == [True, True]
    run.banned[1, 7] = True  # Three are left of whom nobody can be malicious any more.
    assert run.assess(table_of(features, tainted)).by_peers.tolist() == [True, True]
    run.banned[1, 2] = True
    assert run.assess(table_of(features, tainted)).by_peers.tolist() == [True, False]


def test_who_moved_while_nobody_could_look_is_believed_once_most_were_heard() -> None:
    # What is remembered of eight workers is old; five honest ones have moved since, three liars stay where they all were. Only
    # three lanes a step can be verified, so that those of a step are never a majority.
    mesh = Mesh(2, 8)
    run = Run(mesh).run(WARMUP + 8)
    tainted, moved = torch.ones(2, 8, MICRO_BATCHES, dtype=torch.bool), torch.zeros(2, 8, 1, F)
    tainted[0] = False
    moved[1, 3:] = 4.0
    scores = []
    for step in range(16):
        lanes = [(step * 3 + k) % 8 for k in range(3)]
        seen = tainted.clone()
        seen[1, lanes] = False
        assessment, verdict = run.step(table_of(normal(mesh)(0, run.generator) + moved, seen, run.calibration))
        assert assessment.by_peers.all() and not assessment.certain[1] and {worker.stage for worker in verdict.flagged} <= {0}
        scores.append({lane: float(assessment.score[1, lane].median()) for lane in lanes})
    first, last = scores[:2], scores[-5:]
    assert min(score[lane] for score in first for lane in score if lane >= 3) > 0.75  # an open question
    assert max(score[lane] for score in last for lane in score if lane >= 3) < 1
    assert min(score[lane] for score in last for lane in score if lane < 3) > 0.75


def test_the_few_that_are_left_do_not_move_the_trend() -> None:
    mesh, tainted = Mesh(2, 8), torch.zeros(2, 8, MICRO_BATCHES, dtype=torch.bool)
    run = Run(mesh).run(WARMUP + 8)
    tainted[1, 3:] = True
    before = run.calibration.trend.clone()
    for _ in range(20):
        features = normal(mesh)(0, run.generator)
        features[1, :2] += 0.8  # Not enough to be seen by itself.
        table = table_of(features, tainted)
        run.calibration.learn(table, ~tainted, ~tainted, tainted, run.assess(table), run.wiring)
    assert (run.calibration.trend - before)[1].mean() < 0.35


def test_where_most_are_out_of_line_the_median_of_all_stands() -> None:
    mesh = Mesh(2, 4)
    run = Run(mesh).run(WARMUP + 4)
    features = 40 * normal(mesh)(0, run.generator)
    assessment = run.assess(table_of(features))
    expected = centre_by_hand(features.numpy(), np.ones(features.shape[:3], dtype=bool))
    np.testing.assert_allclose(assessment.centred(features).numpy()[0], expected[0], rtol=1e-5)
    assert assessment.score.isfinite().all()
