"""The rivals on runs that were made up, against counting by hand and against a simulation of replays."""

from __future__ import annotations

import random
import statistics

import pytest

from lightning_sentinel.benchmarks.detection.results import Group, Row
from lightning_sentinel.benchmarks.detection.rivals import (
    MedianRule,
    Replay,
    SpreadRule,
    first_alarm,
    harmful_steps,
    workers_at_fault,
)
from lightning_sentinel.benchmarks.detection.rivals_table import beside_rivals
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.truth import Work
from lightning_sentinel.mesh import Worker
from tests.benchmarks.test_detection_results import measures

BROKEN, OTHER = Worker(1, 0), Worker(2, 1)
WORKS = [
    Work(BROKEN, 60, 0, (1e-6, 0.0, 0.0)),
    Work(BROKEN, 62, 1, (0.0, 0.5, 0.1)),
    Work(OTHER, 63, 0, (0.0, 0.0, 0.2)),
    Work(BROKEN, 70, 0, (0.3, 0.0, 0.0)),
]


def test_what_is_masked_is_no_fault() -> None:
    assert workers_at_fault(WORKS) == {BROKEN: 62, OTHER: 63}
    assert harmful_steps(WORKS) == {62, 63, 70}


def test_replays_of_everything_find_everybody_at_once() -> None:
    assert Replay(interval=1, micro_batches=1).finds([WORKS[2], WORKS[3]], 60, 80) == (1.0, 0.0)


def test_nothing_to_find() -> None:
    assert Replay(interval=5, micro_batches=2).finds(WORKS[:1], 60, 80) == (0.0, None)


def test_what_is_expected_is_the_mean_over_replays_that_begin_anywhere() -> None:
    draws, found, waits = random.Random(0), 0, []
    for _ in range(4000):
        offset, turn = draws.randrange(5), draws.randrange(2)
        for worker, first in workers_at_fault(WORKS).items():
            for at, step in enumerate(range(60 + offset, 80, 5)):
                hit = [one for one in WORKS if (one.worker, one.step, one.micro_batch) == (worker, step, (turn + at) % 2)]
                if hit and hit[0].error > 1e-4:
                    found += 1
                    waits.append(step - first)
                    break
    share, wait = Replay(interval=5, micro_batches=2).finds(WORKS, 60, 80)
    assert share == pytest.approx(found / 8000, abs=0.02)
    assert wait == pytest.approx(statistics.fmean(waits), abs=0.3)


def test_the_share_that_is_replayed_is_the_one_asked_for() -> None:
    for share, micro_batches in ((0.02, 1), (0.02, 2), (0.1, 5), (1.0, 1)):
        replay = Replay.at(share, micro_batches)
        assert 1 / (replay.interval * micro_batches) == pytest.approx(share)


@pytest.mark.parametrize("rule", [SpreadRule(4.0), MedianRule(2.0)])
def test_alarms_are_not_learned_from(rule: SpreadRule | MedianRule) -> None:
    steady = [1.0 + 0.01 * (step % 3) for step in range(20)]
    assert rule.alarms([*steady, 9.0, None, 9.0, *steady]) == [False] * 20 + [True] * 3 + [False] * 20


def test_the_rule_of_the_spread_is_its_formula() -> None:
    draws = random.Random(1)
    norms = [draws.gauss(5.0, 1.0) for _ in range(300)]
    alarms = SpreadRule(2.0, window=30).alarms(norms)
    past: list[float] = []
    for norm, alarm in zip(norms, alarms):
        window = past[-30:]
        limit = statistics.fmean(window) + 2 * statistics.pstdev(window) if len(window) > 1 else float("inf")
        assert alarm == (norm > limit)
        past += [] if alarm else [norm]
    assert 0 < sum(alarms) < 30


def test_the_first_alarm_is_counted_from_the_first_of_the_steps() -> None:
    assert first_alarm([False] * 70, harmful_steps(WORKS)) is None
    assert first_alarm([False] * 63 + [True], harmful_steps(WORKS)) == 1


def test_the_table_counts_workers_steps_and_alarms() -> None:
    training = Training(stages=4, replicas=6, micro_batches=2, warmup_steps=60, steps=20)
    settings = {"training": training, "attack": "bit", "spec": "bit_flip", "direction": "both", "fraction": 1 / 6}
    norms = [1.0 + 0.01 * (step % 3) for step in range(80)]
    clean = measures(validation_loss=2.0, norms=list(norms), steps=20)
    norms[62] = 9.0
    shared = {"guilty": [[1, 0], [2, 1]], "steps": 20, "works": [work.row for work in WORKS], "norms": norms}
    unprotected = measures(validation_loss=2.5, banned_at=[], **shared)
    audited = measures(validation_loss=2.1, banned_at=[[1, 0, 65]], audits=20, signals=200, false_bans=0, **shared)
    groups = [
        Group((Row(Scenario(method, 0, **settings), found, clean, unprotected),))  # type: ignore[arg-type]
        for method, found in (("unprotected", unprotected), ("audited", audited))
    ]
    groups.append(Group((Row(Scenario("unprotected", 0, training), clean, clean, None),)))
    *_, bit, nobody = beside_rivals("Faults", groups).strip().splitlines()
    cells = [cell.strip() for cell in bit.strip("|").split("|")]
    # Four of 2 x 20 x 2 micro-batches, one of the four masked; one worker of two banned, three steps after its first harm.
    assert cells[:5] == ["bit", "5.0 %", "25.0 %", "+0.500", "1 of 2 / 3.0 / 0 / +0.100"]
    assert cells[6].split(" / ")[0].endswith("of 2") and cells[7] == cells[8] == "33.3 % / 1 of 1 / 0.0"
    assert [cell.strip() for cell in nobody.strip("|").split("|")][-1] == "0.0 %"
