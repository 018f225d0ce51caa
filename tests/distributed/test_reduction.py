"""Gradients of six processes become those that one process would have had."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.aggregation.definitions import DEFINITIONS, definition
from tests.distributed import world
from tests.distributed.reduction_tasks import CASES, DIVISOR, LARGE, MESH, PATIENCE, SHAPES, SMALL, Case, everything, gradients

USED = [name for name in SHAPES if name not in ("unused", "frozen")]
HONEST = [name for name, case in CASES.items() if case.liar is None]
HEAD = 4 * len(SHAPES)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return world.run(everything, MESH.size, sorted(DEFINITIONS), timeout=100)


def contributions(stage: int, name: str, case: Case) -> list[Tensor]:
    """What each replica has of a gradient, missing ones filled in."""
    everyone = [gradients(rank, case)[name] for rank in MESH.stage_ranks(stage)]
    return [torch.zeros(SHAPES[name]) if value is None else value.float() for value in everyone]


def rows(stage: int, case: Case) -> Tensor:
    """The gradient of the step as each worker that served something estimates it, in one piece."""
    voters = [replica for replica, weight in enumerate(case.weights) if weight > 0]
    whole = torch.stack([torch.cat([contributions(stage, name, case)[voter].flatten() for name in USED]) for voter in voters])
    scales = torch.tensor([sum(case.weights) / case.weights[voter] / DIVISOR for voter in voters], dtype=torch.float64)
    return whole.double() * scales[:, None]


def assert_close(found: Tensor | None, expected: Tensor, name: str) -> None:
    assert found is not None and found.shape == expected.shape
    assert found.dtype == (torch.bfloat16 if name == "half" else torch.float32)
    tolerance = 2e-2 if name == "half" else 2e-6
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_replicas_agree(results: list[dict[str, Tensor | None]]) -> None:
    for stage in range(MESH.stages):
        first, *others = [results[rank] for rank in MESH.stage_ranks(stage)]
        for name, value in first.items():
            for other in others:
                assert (value is None and other[name] is None) or torch.equal(value, other[name]), name


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("name", HONEST)
def test_mean_is_that_of_one_process(ranks: list[dict[str, Any]], name: str, size: int) -> None:
    found = [rank["means"][name, size] for rank in ranks]
    assert_replicas_agree([gradient for gradient, _ in found])
    for rank, (gradient, _) in enumerate(found):
        assert gradient["unused"] is None and gradient["frozen"] is None
        for parameter in USED:
            expected = sum(contributions(MESH.worker(rank).stage, parameter, CASES[name]), torch.zeros(())) / DIVISOR
            assert_close(gradient[parameter], expected, parameter)


def test_few_messages_of_limited_size(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in HONEST:
            assert len(rank["means"][name, LARGE][1]) == 2  # one of each dtype
            small = rank["means"][name, SMALL][1]
            assert len(small) > 10 and max(small) <= SMALL + HEAD
        for rule in DEFINITIONS:
            passes = 1 if rule in ("median", "trimmed_mean") else 2
            assert len(rank["robust"][rule, "equal", LARGE][1]) == 2 * passes
            small = rank["robust"][rule, "equal", SMALL][1]
            assert len(small) > 10 * passes and max(small) <= SMALL + HEAD


def test_large_gradients_are_sent_from_where_they_are(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        sent = rank["in place"]
        assert sent["weight"] == math.ceil(4 * math.prod(SHAPES["weight"]) / SMALL)
        assert sent["scalar"] == sent["sometimes"] == 0


def test_a_stage_of_one_worker_sends_nothing(ranks: list[dict[str, Any]]) -> None:
    for rank in (2, 5):
        found, sizes = ranks[rank]["by itself"]
        assert sizes == []
        assert torch.equal(found.pop("frozen"), torch.ones(SHAPES["frozen"]))
        for name, value in gradients(rank, CASES["equal"]).items():
            if value is None:
                assert name == "frozen" or found[name] is None
            else:
                assert torch.equal(found[name], value / DIVISOR)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("rule", sorted(DEFINITIONS))
def test_robust_means_are_those_of_whole_gradients(ranks: list[dict[str, Any]], rule: str, size: int) -> None:
    for name, case in CASES.items():
        found = [rank["robust"][rule, name, size][0] for rank in ranks]
        assert_replicas_agree(found)
        for rank, gradient in enumerate(found):
            assert gradient["unused"] is None and gradient["frozen"] is None
            expected = definition(rule, rows(MESH.worker(rank).stage, case))
            for parameter, part in zip(USED, expected.split([math.prod(SHAPES[parameter]) for parameter in USED])):
                assert_close(gradient[parameter], part.view(SHAPES[parameter]), parameter)


def test_scale_of_robust_means_is_that_of_the_mean(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name in ("idle", "alone"):  # two at most, so that the median is a mean
            torch.testing.assert_close(
                rank["robust"]["median", name, LARGE][0]["weight"], rank["means"][name, LARGE][0]["weight"], rtol=1e-5, atol=1e-6
            )


def test_a_liar_cannot_deny_the_gradients_of_others(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["robust"]["no head"]
        assert {name for name, value in found.items() if value is not None} == set(USED)
        assert all(found[name].isfinite().all() for name in USED)


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "centred_clipping"])
def test_who_sends_something_else_when_it_is_weighed_has_no_weight(ranks: list[dict[str, Any]], rule: str) -> None:
    found = [rank["robust"]["two faces", rule] for rank in ranks]
    assert_replicas_agree(found)
    for rank, gradient in enumerate(found):
        honest = [contributions(MESH.worker(rank).stage, "weight", CASES["equal"])[replica] for replica in (1, 2)]
        mean, sent = sum(honest, torch.zeros(())).flatten() / 2, gradient["weight"].flatten()
        assert torch.cosine_similarity(sent, mean, dim=0) > 0.9
        assert sent.norm() < 2 * 3 * mean.norm() / DIVISOR


def test_what_cannot_be_reduced_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "does not fit a group of 3 workers" in rank["robust"]["short"]
        assert "nobody served anything" in rank["robust"]["nobody"]
        assert rank["robust"]["typo"].startswith("ConfigurationError: rule='crumb' is unknown: choose one of ['centred_clipping'")


def test_banned_workers_are_in_no_group(ranks: list[dict[str, Any]]) -> None:
    members = [
        {0: [3, 5], 1: [0, 1, 2]},
        {0: [3, 5], 1: [0, 1, 2]},
        {0: [3, 5], 1: [1]},
        {0: [3, 4, 5], 1: [0, 1]},
        {0: [3, 4, 5], 1: [0, 1, 2]},
    ]
    changes = [{0}, set(), {1}, {0, 1}, {1}]  # stages of which the group is another one than before
    for rank, answer in enumerate(ranks):
        *steps, refusal = answer["groups"]
        assert "All workers of stage 1 are banned" in refusal
        stage = MESH.worker(rank).stage
        banned_before = False
        for step, groups, changed in zip(steps, members, changes):
            mine = groups[stage] if rank in groups[stage] else None
            assert step["members"] == mine
            assert step["total"] == (rank if mine is None else sum(mine))
            assert step["new"] == (stage in changed and not (mine is None and banned_before))
            assert step["groups"] == (1 if mine is None else 2)  # the world's, and no old one
            assert step["timeout"] == (None if mine is None else PATIENCE)
            banned_before = mine is None


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_norm_is_clipped_over_all_stages_without_the_banned(ranks: list[dict[str, Any]], max_norm: float) -> None:
    # Worker (1, 0) is banned; its stage is seen through rank 1.
    before = {rank: ranks[rank]["clipped"][max_norm][0] for rank in (1, 3)}
    alone = [(rank, name, nn.Parameter(torch.zeros(SHAPES[name]))) for rank in before for name in USED]
    for rank, name, parameter in alone:
        parameter.grad = before[rank][name].float()
    expected = nn.utils.clip_grad_norm_([parameter for _, _, parameter in alone], max_norm)
    for rank, answer in enumerate(ranks):
        norm, after = answer["clipped"][max_norm][1:]
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        for source, name, parameter in alone:
            if rank > 0 and MESH.worker(rank).stage == MESH.worker(source).stage:
                assert_close(after[name], parameter.grad, name)
