from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.draws import chance_of_each, draw_audits, private_generator, usual_quota, within_quota
from lightning_sentinel.trust.statements import Kind, SignalId, Transfer

REPLICAS = 6
STAGE = 1


def transfers(slots: int, replicas: int = REPLICAS, stages: int = 1) -> list[Transfer]:
    return [
        Transfer(
            Worker(STAGE + stage, lane),
            Worker(STAGE + stage + 1, lane),
            SignalId(Kind.SIGNAL, Boundary(STAGE + stage, Direction.ACTIVATION), lane, slot),
        )
        for stage in range(stages)
        for lane in range(replicas)
        for slot in range(slots)
    ]


def test_only_others_of_its_own_stage_are_drawn() -> None:
    drawn = draw_audits(transfers(2, stages=3), Worker(2, 4), 1.0, quota=1000, generator=private_generator(0))
    assert {one.sender for one in drawn} == {Worker(2, replica) for replica in range(REPLICAS) if replica != 4}
    assert len(drawn) == 2 * (REPLICAS - 1)


def test_each_signal_is_drawn_at_the_rate() -> None:
    """By all auditors together, and each signal alike; the counts are binomial."""
    rate, slots, steps = 0.2, 4, 2000
    sent = transfers(slots)
    chance = chance_of_each(rate, auditors=REPLICAS - 1)
    counts = dict.fromkeys(sent, 0)
    for step in range(steps):
        for replica in range(REPLICAS):
            auditor = Worker(STAGE, replica)
            for one in draw_audits(sent, auditor, chance, len(sent), private_generator(0, str(auditor), step)):
                counts[one] += 1
    total = sum(counts.values())
    trials = steps * len(sent) * (REPLICAS - 1)
    assert stats.binomtest(total, trials, chance).pvalue > 0.001
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_auditors_draw_independently() -> None:
    """Whether two auditors draw the same signal, and whether one draws two signals: as often as chance has it."""
    steps, chance = 4000, 0.3
    sent = transfers(2, replicas=3)
    drawn = np.zeros((steps, 2, 2), dtype=int)
    for step in range(steps):
        for auditor in (0, 1):
            worker = Worker(STAGE, auditor)
            found = draw_audits(sent, worker, chance, len(sent), private_generator(0, str(worker), step))
            of_third = {one.signal.slot for one in found if one.sender.replica == 2}
            drawn[step, auditor] = [slot in of_third for slot in range(2)]
    columns = drawn.reshape(steps, 4)
    for one in range(4):
        for other in range(one):
            both = int((columns[:, one] & columns[:, other]).sum())
            assert stats.binomtest(both, steps, chance**2).pvalue > 0.001
    # Nor does a draw depend on the one of the step before.
    again = int((columns[1:, 0] & columns[:-1, 0]).sum())
    assert stats.binomtest(again, steps - 1, chance**2).pvalue > 0.001


@pytest.mark.parametrize("rate", [0.05, 0.2, 1.0])
def test_a_liar_is_met_after_about_one_over_the_rate_lies(rate: float) -> None:
    """Geometric, with the chance that at least one of the auditors draws its one lie of a step."""
    auditors = REPLICAS - 1
    chance = chance_of_each(rate, auditors)
    met = 1 - (1 - chance) ** auditors
    assert rate * (1 - rate / 2) <= met <= rate
    lie = transfers(1)[0]
    generator = private_generator(1)
    waits = []
    for _ in range(500):
        lies = 1
        while not any(draw_audits([lie], Worker(STAGE, 1 + one), chance, 9, generator) for one in range(auditors)):
            lies += 1
        waits.append(lies)
    deviation = math.sqrt(1 - met) / met / math.sqrt(len(waits))
    assert abs(np.mean(waits) - 1 / met) <= 3.3 * deviation
    assert stats.kstest(np.array(waits) - np.random.default_rng(0).random(len(waits)), _smoothed(met)).pvalue > 0.001


def _smoothed(chance: float) -> object:
    """The distribution of a geometric number less a uniform one, which is continuous."""

    def cumulative(values: np.ndarray) -> np.ndarray:
        whole = np.floor(values)
        part = values - whole
        return (1 - part) * stats.geom.cdf(whole, chance) + part * stats.geom.cdf(whole + 1, chance)

    return cumulative


class TestQuota:
    def test_is_kept_and_spares_nobody(self) -> None:
        sent = transfers(10)
        counts = dict.fromkeys(sent, 0)
        for step in range(600):
            drawn = draw_audits(sent, Worker(STAGE, 0), 0.9, 5, private_generator(0, step))
            assert len(drawn) == 5
            assert drawn == sorted(drawn)
            for one in drawn:
                counts[one] += 1
        of_others = [count for one, count in counts.items() if one.sender.replica != 0]
        assert stats.chisquare(of_others).pvalue > 0.001

    @pytest.mark.parametrize(("rate", "signals"), [(0.01, 320), (0.1, 320), (0.5, 20), (1.0, 20)])
    def test_the_usual_one_is_hardly_ever_in_the_way(self, rate: float, signals: int) -> None:
        chance = chance_of_each(rate, 5)
        quota = usual_quota(chance, signals)
        assert stats.binom.sf(quota, signals, chance) < 1e-4 * 5
        assert quota <= signals

    def test_of_what_others_announce(self) -> None:
        """The sensible ones count, each once, up to the quota."""
        sent = transfers(1, stages=2)
        auditor = Worker(STAGE, 0)
        announced = [sent[0], sent[2], sent[2], sent[REPLICAS + 1], sent[1], sent[4]]
        assert within_quota(announced, auditor, 2) == [sent[2], sent[1]]
        assert within_quota(announced, auditor, 9) == [sent[2], sent[1], sent[4]]
        assert within_quota(announced, auditor, 0) == []


class TestGenerators:
    def test_seeded_ones_are_those_of_their_place(self) -> None:
        first = [private_generator(0, "one", 3).random() for _ in range(2)]
        assert first[0] == first[1]
        places = [(0, "one", 3), (0, "one", 4), (0, "other", 3), (1, "one", 3)]
        assert len({private_generator(*place).random() for place in places}) == 4

    def test_others_are_the_operating_systems(self) -> None:
        assert isinstance(private_generator(None, "one", 3), random.SystemRandom)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ConfigurationError, match=f"An audit rate of {rate} is no share of signals"):
        chance_of_each(rate, 5)
