"""Without audits: an honest worker is flagged in bad company, a liar in any."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.streaks import Streak, is_proof

REPLICAS = 6
MESH = Mesh(4, REPLICAS)
BEFORE, STAGE = 1, 2


def run(seed: int, unseen: int, seen: int, steps: int, shuffle: bool = True) -> Ledger:
    """Workers of a stage behind another, of which ``unseen`` lie such that everybody behind them is out of line, and ``seen`` of
    their own are out of line themselves."""
    ledger, random = Ledger(ban_after=5), Random(seed)
    workers = [Worker(STAGE, replica) for replica in range(REPLICAS)]
    lanes = list(range(REPLICAS))
    for step in range(steps):
        if shuffle and ledger.shuffles:
            random.shuffle(lanes)
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
        alone.add([], [other], shuffles=True)
        together.add([other], [other], shuffles=True)
    assert is_proof(alone, 5) and not is_proof(together, 5)
    assert mine not in together.verified


def test_nobody_is_shuffled_for_what_cannot_be_explained() -> None:
    ledger, worker = Ledger(ban_after=2), Worker(STAGE, 0)
    ledger.record(0, Counter([worker]), {worker}, set(MESH), MESH, unmistakable={worker})
    assert not ledger.shuffles
    ledger.record(1, Counter([worker]), {worker}, set(MESH), MESH, unmistakable={worker})
    assert ledger.banned == {worker}


def test_nobody_is_shuffled_for_who_is_banned_or_cannot_be() -> None:
    ledger, stage = Ledger(ban_after=1), {Worker(STAGE, replica) for replica in range(REPLICAS)}
    for step in range(3):
        suspect = Worker(STAGE, step)
        ledger.record(step, Counter([suspect]), {suspect}, stage - ledger.banned, MESH)
    assert len(ledger.banned) == 2 and len(ledger.spared) == 1 and not ledger.shuffles


def test_a_streak_is_saved_as_plain_numbers() -> None:
    streak = Streak()
    streak.add([Worker(1, 2)], [Worker(1, 1), Worker(1, 2)], shuffles=True)
    loaded = Streak.of_state(json.loads(json.dumps(streak.state())))
    assert loaded.state() == streak.state() and loaded.usual == streak.usual == 1.0
