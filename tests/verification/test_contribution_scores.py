from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.contribution_scores import (
    CONTRIBUTION_FEATURES,
    ContributionScores,
    Reference,
    among_replicas,
    contribution_features,
)
from lightning_sentinel.verification.sketches import SKETCHED
from lightning_sentinel.verification.table import MAX_SCORE

STAGES, REPLICAS, WARMUP, STEPS = 2, 6, 40, 80
LIARS = [1, 4]
"""Replicas of the second stage."""
Corrupts = Callable[[Tensor], Tensor]


def noise_of(generator: torch.Generator) -> Tensor:
    """Along some directions a hundred times as large as along others, as that of real gradients."""
    return torch.randn(STAGES, REPLICAS, SKETCHED, generator=generator) * torch.logspace(-1, 1, SKETCHED)


def found(corrupts: Corrupts | None = None, seed: int = 0) -> tuple[float, list[int]]:
    """The share of honest contributions that were out of line, and the steps until each liar was: it is left out from then on."""
    generator = torch.Generator().manual_seed(seed)
    scores, gradient = ContributionScores(Mesh(STAGES, REPLICAS), Verification(warmup_steps=WARMUP)), torch.zeros(STAGES, SKETCHED)
    weights, first, honest, out = torch.ones(STAGES, REPLICAS), dict[int, int](), 0, 0
    for step in range(STEPS):
        gradient = 0.9 * gradient + 0.5 * torch.randn(STAGES, SKETCHED, generator=generator)
        sketches = gradient[:, None] + noise_of(generator)
        if corrupts is not None and step >= WARMUP:
            sketches[1, LIARS] = corrupts(sketches[1, LIARS])
        scored = scores.assess(sketches, weights)
        wanted = (scored.score > 1) & (weights > 0)
        liars = torch.zeros_like(wanted)
        if corrupts is not None:
            liars[1, LIARS] = True
        first |= {replica: step - WARMUP + 1 for replica in LIARS if bool((wanted & liars)[1, replica])}
        weights[wanted & liars] = 0
        honest += int((step >= WARMUP) * (~liars).sum())
        out += int((wanted & ~liars).sum())
        scores.learn(scored, (weights > 0) & ~(wanted & liars), cleared=wanted & ~liars)
    return out / honest, sorted(first.values())


def test_hardly_any_honest_contribution_is_out_of_line() -> None:
    assert max(found(seed=seed)[0] for seed in range(2)) <= 0.02


BIAS = torch.ones(SKETCHED)
CORRUPTED: dict[str, tuple[Corrupts, int]] = {
    "another sign": (lambda one: -one, 25),
    "ten times as large": (lambda one: 10 * one, 1),
    "nothing": (lambda one: 0 * one, 1),
    # A sixth of the noise in length, and always the same: it shows where the noise is small.
    "a small bias": (lambda one: one + 0.6 * BIAS, 40),
}


@pytest.mark.parametrize("name", CORRUPTED)
def test_two_of_six_are_found_within_some_steps(name: str) -> None:
    corrupts, within = CORRUPTED[name]
    share, steps = found(corrupts)
    assert len(steps) == len(LIARS) and steps[-1] <= within
    assert share <= 0.02


def test_what_outweighs_all_others_is_out_of_line_even_where_honest_ones_were_as_large_in_the_warm_up() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = ContributionScores(Mesh(STAGES, REPLICAS), Verification(warmup_steps=WARMUP))
    everyone = torch.ones(STAGES, REPLICAS)
    for _ in range(WARMUP + 1):
        spikes = torch.where(torch.rand(STAGES, REPLICAS, 1, generator=generator) < 0.15, 100.0, 1.0)
        scored = scores.assess(spikes * noise_of(generator), everyone)
        scores.learn(scored, everyone > 0, scored.score > 1)
    sketches = noise_of(generator)
    sketches[1, LIARS] *= 10
    out = torch.zeros(STAGES, REPLICAS, dtype=torch.bool)
    out[1, LIARS] = True
    assert torch.equal(scores.assess(sketches, everyone).score > 1, out)


def test_half_of_those_that_are_at_work_are_found_as_long_as_others_rest() -> None:
    """Where other stages are hit by bans two of six rest, and the two liars are half of those that do not."""
    generator = torch.Generator().manual_seed(0)
    scores = ContributionScores(Mesh(1, REPLICAS), Verification(warmup_steps=WARMUP))
    everyone = torch.ones(1, REPLICAS)
    for _ in range(WARMUP + 1):
        scored = scores.assess(noise_of(generator)[:1], everyone)
        scores.learn(scored, everyone > 0, scored.score > 1)
    sketches, weights = noise_of(generator)[:1], torch.tensor([[0.0, 1, 0, 1, 1, 1]])
    sketches[0, LIARS] *= 10
    assert (scores.assess(sketches, weights).score > 1).tolist() == [[False, True, False, False, True, False]]


def test_a_contribution_that_is_not_finite_is_out_of_line_unless_most_are() -> None:
    scores, weights = ContributionScores(Mesh(1, 4), Verification()), torch.ones(1, 4)
    sketches = torch.ones(1, 4, SKETCHED)
    sketches[0, 1, 3] = torch.nan
    assert scores.assess(sketches, weights).score.tolist() == [[0, MAX_SCORE, 0, 0]]
    sketches[0, 1:] = torch.inf
    assert scores.assess(sketches, weights).score.tolist() == [[0, 0, 0, 0]]


def test_who_contributes_nothing_is_not_scored_nor_changes_the_others() -> None:
    means = torch.randn(1, 4, SKETCHED, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    missing = torch.cat((means, torch.full((1, 1, SKETCHED), torch.nan, dtype=torch.float64)), dim=1)
    nobody = torch.full((1, 5, len(CONTRIBUTION_FEATURES)), torch.nan)
    features = among_replicas(contribution_features(means, Reference.empty(1, 4))[0], nobody[:, :4])
    raw, agreement = contribution_features(missing, Reference.empty(1, 5))
    others = among_replicas(raw, nobody)
    torch.testing.assert_close(others[:, :4], features)
    assert others[0, 4].isnan().all() and float(agreement[0, 4]) == 0


def test_twice_the_work_is_no_larger_contribution() -> None:
    scores, sketches = ContributionScores(Mesh(1, 3), Verification()), torch.randn(1, 3, SKETCHED)
    weights = torch.tensor([[1.0, 2.0, 1.0]])
    expected = scores.assess(sketches, torch.ones(1, 3)).features
    torch.testing.assert_close(scores.assess(sketches * weights[..., None], weights).features, expected)


def test_replicas_with_the_same_samples_are_all_in_line() -> None:
    scores = ContributionScores(Mesh(1, 3), Verification(warmup_steps=10))
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        sketches = torch.randn(1, 1, SKETCHED, generator=generator).expand(1, 3, -1)
        scored = scores.assess(sketches, torch.ones(1, 3))
        assert not (scored.score > 1).any()
        scores.learn(scored, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool))


def test_a_saved_state_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    mesh, config, everyone = Mesh(STAGES, REPLICAS), Verification(warmup_steps=12), torch.ones(STAGES, REPLICAS)
    one, other = ContributionScores(mesh, config), ContributionScores(mesh, config)
    for step in range(60):
        sketches = 3 + noise_of(generator)
        if step == 30:
            other.load_state_dict(one.state_dict())
        for scores in (one, other) if step >= 30 else (one,):
            scored = scores.assess(sketches, everyone)
            scores.learn(scored, everyone > 0, scored.score > 1)
    assert one.assess(sketches, everyone).score.equal(other.assess(sketches, everyone).score)
    assert bool(one.assess(10 * sketches * torch.tensor([1.0, 0, 0, 0, 0, 0])[:, None], everyone).score[0, 0] > 1)


def test_the_state_of_a_mesh_of_another_size_is_left_where_it_says_nothing() -> None:
    fresh = ContributionScores(Mesh(3, REPLICAS), Verification())
    fresh.load_state_dict(ContributionScores(Mesh(STAGES, REPLICAS), Verification()).state_dict())
    wider = ContributionScores(Mesh(STAGES, 3), Verification())
    wider.load_state_dict(ContributionScores(Mesh(STAGES, REPLICAS), Verification()).state_dict())
    assert wider.assess(torch.ones(STAGES, 3, SKETCHED), torch.ones(STAGES, 3)).score.shape == (STAGES, 3)
