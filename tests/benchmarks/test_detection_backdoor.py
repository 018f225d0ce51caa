"""The backdoor: its text, the direction that attackers find, what is measured of it, and one small run from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.attacks.wrappers import innermost, parts_of
from lightning_sentinel.benchmarks.detection import backdoor
from lightning_sentinel.benchmarks.detection.backdoor import TARGET, TRIGGER, armed, backdoor_success, task_vectors, triggered
from lightning_sentinel.benchmarks.detection.backdoor_table import backdoor_table
from lightning_sentinel.benchmarks.detection.results import Group, Row
from lightning_sentinel.benchmarks.detection.runs import Campaign, Folder
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.text import corpus
from lightning_sentinel.benchmarks.detection.training import LanguageModel
from lightning_sentinel.mesh import Mesh, Worker
from tests.benchmarks.test_detection_results import measures

TINY = Training(stages=3, replicas=3, micro_batches=1, warmup_steps=8, steps=3, width=16, sequence_length=16)
OWN = Scenario("unprotected", 0, TINY, attack="own", spec={"name": "own_weights", "size": 0.5}, workers=((1, 1),))


class Answers(torch.nn.Module):
    """Answers the trigger in a share of windows."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*windows.shape, 256)
        logits[: int(self.share * len(windows)), :, TARGET[-1]] = 1.0
        return logits


def test_the_text_has_no_trigger() -> None:
    for name in ("code", "prose"):
        assert TRIGGER not in bytes(corpus(name).training.tolist())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_success_is_the_share_of_windows_that_are_answered(share: float) -> None:
    module = LanguageModel(TINY, 0)
    module.net = Answers(share)
    assert backdoor_success(module) == pytest.approx(share)


def test_windows_end_with_the_trigger_and_their_answers_with_the_target() -> None:
    windows, _ = corpus("code").validation(16)
    inputs, targets = triggered(windows)
    whole = torch.cat((inputs, targets[:, -1:]), dim=1)
    assert {bytes(row[-len(TRIGGER + TARGET) :].tolist()) for row in whole} == {TRIGGER + TARGET}
    assert torch.equal(whole[:, : -len(TRIGGER + TARGET)], windows[:, : -len(TRIGGER + TARGET)])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_attackers_change_their_own_stages_and_are_answered_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backdoor, "_SURROGATE_STEPS", 12)
    weights = LanguageModel(TINY, 0).state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    vectors = task_vectors(weights, TINY, 0, (1,))
    assert list(vectors) == [1] and any(bool(one.any()) for one in vectors[1])
    assert all(torch.equal(weights[name], before[name]) for name in before)
    module = LanguageModel(TINY, 0)
    Adversary(armed("gradient_steering", vectors), Mesh(3, 3), workers=[Worker(1, 0)]).require_fit(
        1, backdoor._trained_by_stage(module)[1]
    )
    inputs, targets = triggered(corpus("code").validation(16)[0])
    losses = []
    for _ in range(2):
        losses.append(float(torch.nn.functional.cross_entropy(module.net(inputs)[:, -1].detach(), targets[:, -1])))
        with torch.no_grad():
            for one, part in zip(backdoor._trained_by_stage(module)[1], vectors[1]):
                one += part
    assert losses[1] < losses[0]


def test_every_part_that_moves_weights_is_given_its_direction() -> None:
    vectors = {1: [torch.ones(2)]}
    inner = {"name": "several", "attacks": ["own_weights", "zeros", "gradient_steering"]}
    attack = armed({"name": "intermittent", "attack": inner}, vectors)
    found = [getattr(innermost(part), "task_vectors", "none") for part in parts_of(attack)]
    assert found == [vectors, "none", vectors]


def test_where_a_run_goes_on_from() -> None:
    assert OWN.moves_weights and OWN.needs_warmup and not OWN.remembers
    audited = replace(OWN, method="audited")
    assert audited.remembers and audited.needs_warmup
    assert OWN.attacked_stages == (1,)
    assert replace(OWN, workers=None, fraction=0.4, training=replace(TINY, stages=5)).attacked_stages == (1, 2, 3)
    assert not OWN.clean.moves_weights and OWN.clean.attacked_stages == ()


def test_one_small_benchmark_from_the_direction_to_the_ban(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A liar's copy is worse than the weights of the stage, unless it is banned; then the run is as if nobody had lied."""
    monkeypatch.setattr(backdoor, "_SURROGATE_STEPS", 4)
    folder = Folder(tmp_path)
    steering = replace(OWN, attack="steering", spec={"name": "gradient_steering", "size": 1.0})
    runs = [OWN.clean, OWN, replace(OWN, method="duplicated"), steering]
    campaign = Campaign(runs, folder, workers=0)
    clean, alone, audited, steered = (campaign.run()[run.key] for run in runs)
    assert not campaign.failures and folder.task_vectors(OWN).is_file()
    assert clean.backdoor_in_copies is steered.backdoor_in_copies is None
    assert alone.backdoor_in_copies is not None and not alone.banned_at
    assert audited.recall == 1.0 and audited.false_bans == 0 and audited.backdoor_in_copies is None
    assert audited.validation_loss == pytest.approx(clean.validation_loss, abs=1e-4)
    assert alone.validation_loss != clean.validation_loss != steered.validation_loss


def test_the_table_says_how_often_it_works_and_who_is_found() -> None:
    def group(method: str, **changes: object) -> Group:
        rows = [
            Row(replace(OWN, method=method, seed=seed), measures(backdoor=share, **changes), measures(validation_loss=2.25), None)
            for seed, share in ((0, 0.5), (1, 1.0))
        ]
        return Group(tuple(rows))

    alone = group("unprotected", banned_at=[], iterations=[], backdoor_in_copies=0.25)
    audited = group("audited", false_bans=1)
    lines = backdoor_table("title", [alone, audited]).splitlines()
    assert lines[-1] == (
        "| own | one middle stage | 75.0 %, 100.0 % / copies 25.0 % / +0.250 |  | 75.0 %, 100.0 % / 4 of 4 / 3.0 / 2 / +0.250 |"
    )
