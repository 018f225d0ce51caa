"""Runs in which workers lie beside what they send: in rows, notes and votes. The whole mesh is in one process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.attacks import Site
from tests.distributed import tasks
from tests.pipeline.recovery.audited import (
    ATTACKS,
    BOUNDARIES,
    LIARS,
    MICRO_BATCHES,
    STAGES,
    START,
    Run,
    assert_same_weights,
)

SUBTLE = ATTACKS["hardly noticeable"]
ALLIES = [ls.Worker(1, 0), ls.Worker(2, 0)]
"""What the first sends forward the second receives, and the other way round."""


def several(*attacks: Any) -> dict[str, Any]:
    return {"name": "several", "attacks": list(attacks)}


@pytest.fixture(scope="module")
def clean() -> Run:
    torch.manual_seed(5)
    return Run()


CASES: dict[str, tuple[Any, list[ls.Worker], set[str]]] = {
    "invented rows": ({"name": "false_rows", "hide": None, "invent": 1.0}, LIARS, {"row"}),
    "hidden lies": (several(SUBTLE, "false_rows"), ALLIES, {"row"}),
    "lies called tainted": (several(ATTACKS["loud"], {"name": "false_rows", "hide": "taint"}), ALLIES, {"row"}),
    "false notes": ("false_notes", [ls.Worker(0, 1), ls.Worker(0, 2)], {"note"}),
    "every role": (several(SUBTLE, {"name": "false_rows", "invent": 1.0}, "false_notes", "false_votes"), LIARS, {"row"}),
}


@pytest.mark.parametrize("name", CASES)
def test_whoever_lies_is_banned_nobody_else_is_and_weights_are_those_of_a_clean_run(name: str, clean: Run) -> None:
    attack, liars, features = CASES[name]
    run = Run(attack, liars)
    assert run.ledger.banned == set(liars) and set(run.ledger.banned_at.values()) <= {START, START + 1}
    assert_same_weights(clean, run)
    found = {d.feature for d in run.strategy.detections if d.confirmed}
    assert features <= found
    assert {d.worker for d in run.strategy.detections if d.confirmed} == set(liars)


def test_a_note_that_blames_a_neighbour_convicts_its_author_at_the_first_flag() -> None:
    # Hardly any audit is drawn: the flag of an honest worker is what leads to the note.
    run = Run("false_notes", [ls.Worker(0, 1)], rate=1e-6, warmup=3, steps=12)
    assert run.ledger.banned == {ls.Worker(0, 1)}
    exonerated = [d for d in run.strategy.detections if d.confirmed is False]
    assert {d.worker for d in run.strategy.detections if d.confirmed} == {ls.Worker(0, 1)}
    assert exonerated and run.ledger.exonerated.total() == len(exonerated)


def test_false_rows_are_reported_and_not_learned_from_where_nothing_follows(clean: Run) -> None:
    response = {"on_flag": "log", "ban_after": None}
    run = Run({"name": "false_rows", "hide": None, "invent": 1.0}, LIARS, response=response)
    assert not run.ledger.banned
    assert {(d.worker, d.feature) for d in run.strategy.detections if d.confirmed} == {(liar, "row") for liar in LIARS}
    assert_same_weights(clean, run)
    trends = [one.strategy._run.guard.calibration.trend for one in (clean, run)]
    torch.testing.assert_close(*trends, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_who_commits_to_another_signal_contradicts_more_and_more_neighbours_until_it_is_banned(side: str) -> None:
    steps = START + 4
    clean, run = Run(steps=steps), Run({"name": "equivocate", "side": side}, LIARS, steps=steps)
    assert run.ledger.banned == set(LIARS) and max(run.ledger.banned_at.values()) <= START + 3
    for liar in LIARS:
        of_stages = Counter(other.stage for other in run.ledger.contradicted[liar])
        # More of one stage than can lie there.
        assert max(of_stages.values()) == 3 and not run.ledger.contradicted[liar].intersection(LIARS)
    assert_same_weights(clean, run)
    assert run.attempts.steps.count(START) == 2 and not run.strategy.detections


def test_contradictions_are_told_and_cost_nothing_where_nothing_follows(clean: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("equivocate", LIARS, response={"on_flag": "log", "ban_after": None})
    told = capsys.readouterr().out
    assert f"Contradiction at step {START}" in told and "this run only reports it" in told
    assert not run.ledger.banned and run.attempts.steps == [*range(START + 3)]
    assert_same_weights(clean, run, tolerance=0.0)


class SaysWhatIsTrue:
    """Where an attacker might report another row, it reports its own: so the virtual mesh measures each of them again."""

    site = Site.ROWS

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, row: Tensor, context: ls.AttackContext) -> Tensor:
        self.rows += 1
        return row.clone()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_honest_receivers_are_measured_again_and_confirmed(precision: Any) -> None:
    honest = SaysWhatIsTrue()
    workers = [ls.Worker(stage, replica) for stage in range(STAGES) for replica in range(2)]
    run = Run(honest, workers, module=tasks.Classifier("adamw"), warmup=4, steps=START + 4, precision=precision)
    # Of each step two micro-batches of two lanes at each boundary.
    assert honest.rows == 4 * BOUNDARIES * 2 * MICRO_BATCHES
    assert not run.ledger.banned and not run.ledger.muted
    assert not [d for d in run.strategy.detections if d.confirmed is not False]
