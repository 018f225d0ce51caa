"""Without audits: an honest worker is flagged in bad company, a liar in any."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.streaks import Sighting, Streak, is_proof

REPLICAS = 6
MESH = Mesh(4, REPLICAS)
BEFORE, STAGE = 1, 2


def run(seed: int, unseen: int, seen: int, steps: int, shuffle: bool = True) -> Ledger:
    """Workers of a stage behind another, of which ``unseen`` lie such that everybody behind them is out of line, and ``seen`` of
    their own are out of line themselves."""
    ledger = Ledger(ban_after=5)
    workers = [Worker(STAGE, replica) for replica in range(REPLICAS)]
    for step in range(steps):
        order, lanes = ledger.order(step), list(range(REPLICAS))
        if shuffle and order is not None:
            Random(f"{seed} {order}").shuffle(lanes)
        suspects = {worker for worker, lane in zip(workers, lanes) if lane < unseen or worker.replica >= REPLICAS - seen}
        verified = set(workers) - ledger.banned
        ledger.record(step, Counter(suspects - ledger.banned), suspects - ledger.banned, verified, MESH)
    return ledger


@pytest.mark.parametrize("unseen", [1, 2, 3])
def test_who_is_behind_a_lie_that_nobody_sees_is_not_banned(unseen: int) -> None:
    for seed in range(30):
        assert not run(seed, unseen, seen=0, steps=200).banned, seed


def test_without_other_company_it_would_be() -> None:
    assert run(0, unseen=2, seen=0, steps=5, shuffle=False).streaks[Worker(STAGE, 0)].steps == 5


@pytest.mark.parametrize(("unseen", "latest"), [(0, 4), (1, 25), (2, 60)])
def test_a_liar_is_banned_in_any_company(unseen: int, latest: int) -> None:
    liars = {Worker(STAGE, REPLICAS - 2), Worker(STAGE, REPLICAS - 1)}
    for seed in range(20):
        ledger = run(seed, unseen, seen=2, steps=100)
        assert ledger.banned == liars, seed
        assert max(ledger.banned_at.values()) <= latest, (seed, ledger.banned_at)


def test_with_two_workers_the_other_one_shows_what_is_usual() -> None:
    mine, other = Worker(1, 0), Worker(1, 1)
    alone, together = Streak(), Streak()
    for _ in range(5):
        alone.add(Sighting((), (other,), unmistakable=False))
        together.add(Sighting((other,), (other,), unmistakable=False))
    assert is_proof(alone, 5) and not is_proof(together, 5)
    assert mine not in together.verified


def test_what_cannot_be_explained_is_enough_whatever_others_do_and_nobody_is_shuffled_for_it() -> None:
    ledger, worker = Ledger(ban_after=2), Worker(STAGE, 0)
    ledger.habits.add(set(MESH) - {worker}, set(MESH))
    ledger.record(0, Counter([worker]), {worker}, set(MESH), MESH, unmistakable={worker})
    assert ledger.order(1) is None
    ledger.record(1, Counter([worker]), {worker}, set(MESH), MESH, unmistakable={worker})
    assert ledger.banned == {worker}


def test_nobody_is_shuffled_for_who_is_banned_or_cannot_be() -> None:
    ledger, stage = Ledger(ban_after=1), {Worker(STAGE, replica) for replica in range(REPLICAS)}
    for step in range(3):
        suspect = Worker(STAGE, step)
        ledger.record(step, Counter([suspect]), {suspect}, stage - ledger.banned, MESH)
    assert len(ledger.banned) == 2 and len(ledger.spared) == 1 and ledger.order(3) is None


def test_a_streak_is_saved_as_plain_numbers() -> None:
    streak = Streak()
    streak.add(Sighting((Worker(1, 2),), (Worker(1, 1), Worker(1, 2)), unmistakable=False))
    loaded = Streak.of_state(json.loads(json.dumps(streak.state())))
    assert loaded.state() == streak.state() and loaded.usual == streak.usual == 1.0


def test_workers_stay_where_they_were_shuffled_to_for_a_while() -> None:
    ledger, worker = Ledger(), Worker(STAGE, 0)
    for step in range(2):
        ledger.record(step, Counter([worker]), {worker}, set(MESH), MESH)
        assert ledger.order(step + 1) == step + 1, "a new order in every step"
    ledger.record(2, Counter(), set(), set(MESH), MESH)
    assert ledger.order(3) == ledger.order(17) == 2 and ledger.order(18) is None
    resumed = Ledger()
    resumed.load_state_dict(ledger.state_dict())
    assert resumed.order(17) == 2


def test_others_that_are_far_less_out_of_line_show_nothing() -> None:
    mine, other = Worker(1, 0), Worker(1, 1)
    for score, banned in ((40.0, {mine}), (60.0, set())):
        ledger = Ledger(ban_after=5)
        for step in range(-40, 0):
            ledger.record(step, Counter(), set(), {mine, other}, Mesh(2, 2))
        for step in range(5):
            scores = {mine: 100.0, other: score}
            ledger.record(step, Counter({mine: 1}), scores if step == 2 else {mine}, {mine, other}, Mesh(2, 2), scores=scores)
        assert ledger.banned == banned
