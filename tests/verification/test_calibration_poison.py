"""Somebody who knows the statistics, and somebody who is only different."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh
from tests.verification.runs import MICRO_BATCHES, WARMUP, Draw, Run, normal
from tests.verification.tools import table_of


def after(start: int, mesh: Mesh, change: Draw) -> Draw:
    """Normal features that are changed from a step on, by a function of them in place of the step."""

    def draw(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        return change(features, generator) if step >= start else features  # type: ignore[arg-type]

    return draw


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_minority_just_inside_the_fences_does_not_widen_them_for_good(share: float) -> None:
    mesh = Mesh(2, 6)

    def poison(features: Tensor, generator: torch.Generator) -> Tensor:
        fences, centre = run.calibration.among_peers.fences, features[:, 2:].median(dim=1, keepdim=True).values
        inside = centre + 0.9 * fences.upper[:, None, None]
        lies = torch.rand(2, 2, MICRO_BATCHES, 1, generator=generator) < share
        features[:, :2] = torch.where(lies, inside.expand_as(features)[:, :2], features[:, :2])
        return features

    run = Run(mesh, after(WARMUP + 1, mesh, poison), window=256)  # type: ignore[arg-type]
    run.run(WARMUP + 1)
    width = run.calibration.among_peers.fences.upper.clone()
    run.run(300)
    assert (run.calibration.among_peers.fences.upper / width).median() < 1.1
    assert (run.calibration.among_peers.fences.upper / width).max() < 1.3


@pytest.mark.parametrize(("replicas", "liars"), [(8, 3), (6, 2), (4, 1)])
def test_a_minority_just_below_the_others_has_nobody_honest_banned(replicas: int, liars: int) -> None:
    mesh = Mesh(2, replicas)

    def frame(features: Tensor, generator: torch.Generator) -> Tensor:
        features[:, :liars] = features[:, liars:].mean(dim=2, keepdim=True).amin(dim=1, keepdim=True) - 0.05
        return features

    run = Run(mesh, after(WARMUP + 20, mesh, frame), ban_after=5, window=512).run(WARMUP + 170)  # type: ignore[arg-type]
    assert all(worker.replica < liars for worker in run.ledger.banned)


def test_who_is_different_from_the_start_is_not_drifting() -> None:
    mesh = Mesh(2, 8)

    def draw(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        features[:, 5, :, 3:6] += 1.5
        features[:, 5, :, 7] *= 2
        return features

    run = Run(mesh, draw, ban_after=5, window=1024, warmup_steps=40).run(200)
    assert run.ledger.banned == frozenset()
    # And is one that drifts when it begins to.
    odd = draw

    def drifts(step: int, generator: torch.Generator) -> Tensor:
        features = odd(step, generator)
        features[0, 5, :, 3] += 1.5
        return features

    run.draw = drifts
    run.run(40)
    assert {(worker.stage, worker.replica) for worker in run.ledger.banned} == {(0, 5)}


def test_a_feature_that_stood_still_in_the_warm_up_may_move_a_little() -> None:
    mesh = Mesh(2, 8)

    def draw(step: int, generator: torch.Generator) -> Tensor:
        features = normal(mesh)(step, generator)
        # Of one of six positions the sign, for some of the signals, once the warm-up is over.
        flips = torch.rand(features.shape[:3], generator=generator) < 0.2
        features[..., 2] = flips / 6.0 if step >= WARMUP else 0.0
        return features

    run = Run(mesh, draw, ban_after=5, window=512).run(WARMUP + 100)
    assert run.ledger.banned == frozenset()
    assert sum(run.flags[WARMUP:]) <= 0.01 * 100 * 2 * 8 * MICRO_BATCHES
    features = normal(mesh)(0, run.generator)
    features[..., 2] = 0.0
    features[0, 3, :, 2] = 1.0
    assert (run.assess(table_of(features)).score[0, 3] > 1).all()


def test_of_four_replicas_three_go_on_being_compared_after_a_ban() -> None:
    run = Run(Mesh(2, 4)).run(WARMUP + 8)
    run.banned[:, 3] = True
    run.wiring = dataclasses.replace(run.wiring, live=(True, True, True, False))
    features = normal(run.mesh)(0, run.generator)
    features[0, 1] += 12
    assessment = run.assess(table_of(features))
    assert assessment.by_peers.all() and assessment.certain[0]
    assert (assessment.score[0, 1] > 1).all() and (assessment.score[0, [0, 2]] < 1.5).all()


def test_one_replica_that_is_always_just_outside_does_not_widen_its_fences_for_good() -> None:
    mesh = Mesh(2, 1)

    def outside(features: Tensor, generator: torch.Generator) -> Tensor:
        fences = run.calibration.alone.fences
        return (run.calibration.trend + 1.4 * fences.upper)[:, None, None].expand_as(features).clone()

    run = Run(mesh, after(WARMUP + 8, mesh, outside), window=64).run(WARMUP + 8)  # type: ignore[arg-type]
    assert run.calibration.alone.settled.all()
    fences = run.calibration.alone.fences
    width = fences.upper - fences.lower
    run.run(300)
    fences = run.calibration.alone.fences
    assert ((fences.upper - fences.lower) / width).max() < 4.1
