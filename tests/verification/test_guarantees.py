"""What docs/theory.md promises, against simulations with the classes that run: who is met when, and who is banned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.audit import AuditSchedule, made_of_data
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.verification.guarantees import (
    Wait,
    chance_met,
    chance_met_in_step,
    chance_of_false_ban,
    chance_of_false_finding,
    chance_of_lost_stage,
    lies_that_count,
    steps_until_met,
    steps_until_met_twice,
)
from lightning_sentinel.verification.jury import Auditable, Case, Jury, Subject
from lightning_sentinel.verification.majority import most_liars, strikes_to_ban, weigh
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.wiring import Wiring

MATCHES, LIED = Outcome.MATCHES, Outcome.LIED
SURELY = 0.001
"""How unlikely a figure of a simulation may be under the formula."""


def drawn(mesh: Mesh, rate: float, steps: int, signals: int) -> Tensor:
    """Signals that any worker draws, ``(steps, boundaries, lanes, signals)`` bool."""
    schedule, wiring = AuditSchedule(mesh, rate), Wiring.of(mesh, micro_batches=signals)
    own = (schedule.draw(Draws.seeded(mesh, 5, step), step, {}, wiring) for step in range(steps))
    return torch.stack([one.signals.any(dim=0) for one in own])


def follows(waits: Sequence[int], chance: float) -> bool:
    """Whether numbers of trials, from 1 on, are geometrically distributed."""
    edges = np.unique(stats.geom(chance).ppf(np.linspace(0, 1, 9)[1:-1]))
    bounds = [0, *edges, math.inf]
    counts, _ = np.histogram(waits, [bound + 0.5 for bound in bounds])
    expected = len(waits) * np.diff(stats.geom(chance).cdf(bounds))
    return bool(stats.chisquare(counts, expected).pvalue > SURELY)


def almost(simulated: Sequence[float], mean: float) -> bool:
    """Whether the mean of independent figures is as expected, within four of its deviations."""
    return bool(abs(np.mean(simulated) - mean) < 4 * np.std(simulated) / math.sqrt(len(simulated)))


# --- Until a liar is met


@pytest.mark.parametrize(("rate", "lying", "signals"), [(0.05, 0.3, 2), (0.1, 1.0, 1), (0.02, 0.8, 4)])
def test_steps_until_a_liar_is_met_are_geometric(rate: float, lying: float, signals: int) -> None:
    """Hundreds of liars at once, whose lies are drawn by nobody who knows the audits."""
    mesh = Mesh(10, 24)
    generator = torch.Generator().manual_seed(1)
    inner = ~made_of_data(mesh)
    chance = chance_met_in_step(chance_met(rate, live=24), signals, lying)
    expected = steps_until_met(chance)
    steps = 8 * round(expected.mean)
    met = drawn(mesh, rate, steps, signals)[:, inner]
    met &= torch.rand(met.shape, generator=generator) < lying
    found = met.any(dim=3)
    assert found.any(dim=0).float().mean() > 0.99
    waits = (found.int().argmax(dim=0) + 1)[found.any(dim=0)].tolist()
    assert follows(waits, chance)
    assert expected.median == pytest.approx(np.median(waits), abs=0.12 * expected.mean)
    assert expected.late == stats.geom(chance).ppf(0.99) and np.mean(np.array(waits) > expected.late) < 0.03


def test_the_ends_of_the_pipeline_are_met_sooner_by_the_factor() -> None:
    mesh, rate = Mesh(3, 60), 0.02
    met = drawn(mesh, rate, 150, 1)[:, made_of_data(mesh)].flatten(1)
    waits = (met.int().argmax(dim=0) + 1)[met.any(dim=0)].tolist()
    assert follows(waits, chance_met(3 * rate, live=60))


@pytest.mark.parametrize(("replicas", "silent"), [(6, 0), (6, 1), (6, 2), (5, 1), (9, 3)])
def test_a_lie_is_met_if_an_honest_worker_draws_it_whatever_accomplices_draw_and_say(replicas: int, silent: int) -> None:
    """Those that draw everything would like to be asked in place of the honest ones."""
    rate, mesh, liar = 0.3, Mesh(2, replicas), Worker(0, 0)
    accomplices = {Worker(0, 1 + number) for number in range(silent)}
    schedule, wiring, met, steps = AuditSchedule(mesh, rate), Wiring.of(mesh, micro_batches=8), 0, 250
    factor = 2  # Of two stages both send what is made of data.

    def ask(asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        return [LIED if case.audited == liar and juror not in accomplices else MATCHES for case, juror in asked]

    for step in range(steps):
        draws = Draws.seeded(mesh, 3, step)
        own = schedule.draw(draws, step, {}, wiring)
        for accomplice in accomplices:
            own.signals[accomplice.replica, 0, 0] = True
        nothing = torch.zeros(own.signals.shape[1:], dtype=torch.bool)
        found = Jury(mesh).hear(Auditable(nothing, own), wiring, (), (), draws.coin, ask, (Subject.SIGNAL,))
        met += int((found.outcome[0, 0] == LIED).sum())
    if silent < most_liars(replicas):
        assert stats.binomtest(met, steps * 8, chance_met(factor * rate, replicas, silent)).pvalue > SURELY
        assert chance_met(rate, replicas, silent) >= rate - 1e-12, "with as many accomplices as there can be"
    else:
        assert chance_met(rate, replicas, silent) < rate


def test_an_accomplice_that_is_asked_first_lets_a_flag_pass() -> None:
    mesh, accomplices = Mesh(2, 6), {Worker(0, 1), Worker(0, 2)}
    jury = Jury(mesh)
    firsts = [jury.others(Worker(0, 0), (), coin, 0, 0, 0)[0] for coin in range(2000)]
    met = sum(first not in accomplices for first in firsts)
    assert stats.binomtest(met, 2000, 3 / 5).pvalue > SURELY


class Stage:
    """The first of two stages: who lies in it, what auditors say, and what follows, by the classes that run."""

    def __init__(self, replicas: int, seed: int, word: Callable[[Worker, Worker], Outcome], rate: float) -> None:
        self.mesh, self.word = Mesh(3, replicas), word
        self.jury, self.ledger, self.schedule, self.seed = Jury(self.mesh), Ledger(), AuditSchedule(self.mesh, rate), seed
        self.index = self.mesh.boundaries.index(Boundary(1, Direction.ACTIVATION))

    def step(self, step: int, signals: int) -> set[Worker]:
        """Audits of what the middle stage sends forward, and whom they find to lie."""
        found = {worker.stage: when for worker, when in self.ledger.muted.items()}
        wiring = Wiring.of(self.mesh, self.ledger.banned, signals)
        unheard = self.ledger.banned, self.ledger.muted
        draws = Draws.seeded(self.mesh, self.seed, step)
        own = self.schedule.draw(draws, step, found, wiring, *unheard)
        own.signals[:, torch.arange(len(self.mesh.boundaries)) != self.index] = False
        if not own.signals.any():
            return set()
        audited = Auditable(torch.zeros(own.signals.shape[1:], dtype=torch.bool), own)
        findings = self.jury.hear(audited, wiring, *unheard, draws.coin, self.ask, (Subject.SIGNAL,))
        guilty = {wiring.worker(1, lane) for _, lane, _ in (findings.outcome == LIED).nonzero().tolist()}
        outvoted = frozenset().union(*findings.outvoted.values())
        self.ledger.record_audits(step, 0, Counter(guilty), Counter(), guilty, outvoted, self.mesh)
        return guilty

    def ask(self, asked: Sequence[tuple[Case, Worker]]) -> list[Outcome]:
        return [self.word(case.audited, juror) for case, juror in asked]


def banned_after(stage: Stage, worker: Worker, signals: int, most: int = 2000) -> int | None:
    for step in range(most):
        stage.step(step, signals)
        if worker in stage.ledger.banned:
            return step + 1
    return None


@pytest.mark.parametrize("replicas", [4, 5])
def test_a_ban_takes_one_meeting_of_five_replicas_and_two_of_four_the_second_on_alert(replicas: int) -> None:
    liar, rate, runs = Worker(1, 0), 0.04, 120

    def honest(audited: Worker, juror: Worker) -> Outcome:
        return LIED if audited == liar else MATCHES

    waits = [banned_after(Stage(replicas, seed, honest, rate), liar, signals=2) for seed in range(runs)]
    assert None not in waits
    usual, alert = (chance_met_in_step(chance_met(factor * rate, replicas), signals=2) for factor in (1, 3))
    once, twice = steps_until_met(usual).mean, steps_until_met_twice(usual, alert)
    assert strikes_to_ban(replicas) == (1 if replicas == 5 else 2)
    assert almost([wait or 0 for wait in waits], once if replicas == 5 else twice)
    assert once < twice < 2 * once


def test_of_two_replicas_nobody_is_ever_banned() -> None:
    stage = Stage(2, 0, lambda audited, juror: LIED, rate=1.0)
    assert banned_after(stage, Worker(1, 0), signals=1, most=50) is None
    assert chance_of_false_ban(0.5, 1.0, 1, 50, strikes_to_ban(2)) == 0.0


@pytest.mark.parametrize("lies", [1, 4])
def test_lies_that_get_into_the_weights_before_the_first_is_met(lies: int) -> None:
    rate, mesh = 0.1, Mesh(10, 24)
    met = drawn(mesh, rate, 120, lies)[:, ~made_of_data(mesh)].any(dim=3).flatten(1)
    spoilt = lies * met.int().argmax(dim=0).double()
    expected = lies_that_count(chance_met(rate, live=24), lies)
    assert almost(spoilt.tolist(), expected.mean)
    assert (spoilt > expected.late).double().mean() < 0.03
    assert expected.mean <= lies_that_count(rate, lies).mean <= lies_that_count(rate).mean == pytest.approx((1 - rate) / rate)


def test_no_strategy_gets_more_lies_through() -> None:
    """Liars that lie in bursts, after a pause, or more the longer they go unseen."""
    rate, generator = 0.2, Random(0)
    most = lies_that_count(rate).mean
    for burst in (lambda told: 1, lambda told: 3, lambda told: 1 + told, lambda told: 1 + told % 5):
        counted = []
        for _ in range(3000):
            told = 0
            while all(generator.random() >= rate for _ in range(burst(told))):
                told += burst(told)
            counted.append(told)
        assert np.mean(counted) < most + 4 * np.std(counted) / math.sqrt(len(counted))


# --- Whether an honest worker is banned


def most_of(said: list[Outcome]) -> bool:
    return 2 * said.count(LIED) > len(said)


@pytest.mark.parametrize(("replicas", "liars", "drawn"), [(6, 2, 3), (6, 2, 2), (7, 3, 3), (6, 2, 4)])
def test_drawn_witnesses_find_honest_workers_guilty_as_often_as_the_formula_says(replicas: int, liars: int, drawn: int) -> None:
    """In the order in which a jury asks; 20 % of two witnesses after the first auditor, with two liars among five."""
    jury, audited, trials = Jury(Mesh(2, replicas)), Worker(0, 0), 3000
    guilty = 0
    for step in range(trials):
        asked = jury.others(audited, (), step, 0, 0, 0)[:drawn]  # Each step has another coin.
        said = [LIED if worker.replica <= liars else MATCHES for worker in asked]
        guilty += said[0] == LIED and most_of(said)
    chance = chance_of_false_finding(replicas, liars, drawn)
    assert stats.binomtest(guilty, trials, chance).pvalue > SURELY
    if (replicas, liars, drawn) == (6, 2, 3):
        assert chance == pytest.approx(0.2)


@pytest.mark.parametrize("replicas", range(2, 10))
def test_if_all_vote_none_is_found_guilty_as_long_as_liars_are_no_more_than_half(replicas: int) -> None:
    for liars in range(replicas):
        others = [Worker(0, replica) for replica in range(1, replicas)]
        votes = {worker: LIED if worker.replica <= liars else MATCHES for worker in others}
        judged = weigh(votes, replicas).outcome
        chance = chance_of_false_finding(replicas, liars)
        assert (judged == LIED) == (2 * liars > replicas) == (chance > 0)
        assert chance == pytest.approx(liars / len(others) if chance else 0.0), "that a liar is asked first"
        if 2 * liars < replicas:
            assert judged == MATCHES


@pytest.mark.parametrize(("replicas", "liars", "erring"), [(5, 2, 0.2), (5, 0, 0.4), (4, 1, 0.3), (3, 1, 0.2), (6, 2, 0.3)])
def test_honest_workers_that_err_count_as_liars_while_they_do(replicas: int, liars: int, erring: float) -> None:
    generator, jury, trials = Random(2), Jury(Mesh(2, replicas)), 3000
    guilty = 0
    for step in range(trials):
        asked = jury.others(Worker(0, 0), (), step, 0, 0, 0)
        said = {one: LIED if one.replica <= liars or generator.random() < erring else MATCHES for one in asked}
        guilty += said[asked[0]] == LIED and weigh(said, replicas).outcome == LIED
    assert stats.binomtest(guilty, trials, chance_of_false_finding(replicas, liars, erring=erring)).pvalue > SURELY


@pytest.mark.parametrize(("replicas", "erring"), [(5, 0.15), (4, 0.2)])
def test_in_a_run_honest_workers_are_banned_no_more_often_than_the_formula_says(replicas: int, erring: float) -> None:
    """A minority lies as it can and all others err. The ledger takes the word from who was outvoted, so it happens less.

    Bans for being outvoted are none for what audits find, which is what the formula is about.
    """
    liars, rate, steps, runs = (replicas - 1) // 2, 0.05, 30, 60
    banned = 0
    for seed in range(runs):
        generator = Random(seed)

        def word(audited: Worker, juror: Worker, generator: Random = generator) -> Outcome:
            return LIED if juror.replica > replicas - 1 - liars or generator.random() < erring else MATCHES

        stage = Stage(replicas, seed, word, rate)
        stage.ledger.false_accusations = None
        banned += banned_after(stage, Worker(1, 0), signals=2, most=steps) is not None
    finding = chance_of_false_finding(replicas, liars, erring=erring)
    # On alert audits are three times as frequent.
    most = chance_of_false_ban(finding, 3 * rate, signals=2, steps=steps, strikes=strikes_to_ban(replicas))
    assert stats.binomtest(banned, runs, most, alternative="greater").pvalue > SURELY
    assert chance_of_false_ban(chance_of_false_finding(replicas, liars), 3 * rate, 2, steps, strikes_to_ban(replicas)) == 0.0


@pytest.mark.parametrize("strikes", [1, 2])
def test_the_chance_of_a_run_is_that_of_its_steps(strikes: int) -> None:
    finding, rate, signals, steps, runs = 0.2, 0.1, 4, 20, 4000
    generator = torch.Generator().manual_seed(0)
    found = (torch.rand(runs, steps, signals, generator=generator) < rate) & (
        torch.rand(runs, steps, signals, generator=generator) < finding
    )
    banned = int((found.any(dim=2).sum(dim=1) >= strikes).sum())
    assert stats.binomtest(banned, runs, chance_of_false_ban(finding, rate, signals, steps, strikes)).pvalue > SURELY


@pytest.mark.parametrize(("stages", "replicas", "malicious"), [(8, 8, 12), (6, 6, 9), (4, 3, 3)])
def test_a_stage_is_lost_by_chance_no_more_often_than_the_formula_says(stages: int, replicas: int, malicious: int) -> None:
    workers, runs = stages * replicas, 4000
    generator = np.random.default_rng(0)
    dealt = generator.permuted(np.tile(np.arange(workers) < malicious, (runs, 1)), axis=1).reshape(runs, stages, replicas)
    lost = int((2 * dealt.sum(axis=2) >= replicas).any(axis=1).sum())
    chance = chance_of_lost_stage(workers, malicious, replicas)
    of_one = stats.hypergeom(workers, malicious, replicas).sf((replicas + 1) // 2 - 1)
    assert chance == pytest.approx(stages * of_one)
    assert stats.binomtest(lost, runs, chance, alternative="greater").pvalue > SURELY
    assert lost / runs > 0.7 * chance, "nor far less"


# --- What cannot be asked


@pytest.mark.parametrize(
    "ask",
    [
        lambda: chance_met(1.5, 4),
        lambda: chance_met(0.1, 4, silent=4),
        lambda: chance_met_in_step(-0.1, 2),
        lambda: chance_of_false_finding(4, 4),
        lambda: chance_of_false_finding(4, 1, drawn=5),
        lambda: chance_of_lost_stage(8, 9, 2),
    ],
)
def test_what_is_no_chance_is_refused(ask: Callable[[], float]) -> None:
    with pytest.raises(ConfigurationError, match="Give a number from 0 to"):
        ask()


def test_who_is_never_met_and_who_always_is() -> None:
    assert steps_until_met(1.0) == Wait(1.0, 1, 1)
    assert math.isinf(steps_until_met(0.0).mean) and math.isinf(lies_that_count(0.0).mean)
    assert chance_met(0.5, live=1) == 0.0
    assert math.isinf(steps_until_met_twice(0.0, 0.0))
