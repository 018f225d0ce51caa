from __future__ import annotations

import pytest
import torch

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.verification import Detection, StepVerdict
from lightning_sentinel.verification.contributions import WEIGHT_GRADIENT, with_contributions
from lightning_sentinel.verification.jury import ContributionCase, Jury
from lightning_sentinel.verification.majority import Judgement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.wiring import Wiring
from tests.verification.steps import Step

MESH = Mesh(3, 4)
WIRING = Wiring.of(MESH, {Worker(0, 1)})
"""The workers of other stages that serve a lane are not all of its number."""
CASE = ContributionCase(lane=2, audited=WIRING.worker(1, 2))
STEP = 7


def judged(outcome: Outcome, score: float = 0.5) -> StepVerdict:
    scores = torch.zeros(MESH.stages, MESH.replicas)
    scores[1, CASE.audited.replica] = score
    found = {} if outcome == Outcome.MATCHES else {CASE: Judgement(outcome, frozenset({Worker(1, 3)}))}
    return with_contributions(Step(MESH.stages, MESH.replicas).judge(), [CASE], found, scores, WIRING, STEP)


def detected(worker: Worker, direction: Direction, score: float, confirmed: bool | None) -> Detection:
    return Detection(STEP, 0, worker, direction, score, WEIGHT_GRADIENT, audited=True, confirmed=confirmed)


@pytest.mark.parametrize(
    ("outcome", "worker", "direction"),
    [
        (Outcome.LIED, CASE.audited, Direction.GRADIENT),
        (Outcome.ACTIVATION_WITHHELD, WIRING.worker(0, 2), Direction.ACTIVATION),
        (Outcome.GRADIENT_WITHHELD, WIRING.worker(2, 2), Direction.GRADIENT),
    ],
)
def test_who_lied_or_withheld_what_the_auditor_needs_is_guilty(outcome: Outcome, worker: Worker, direction: Direction) -> None:
    verdict = judged(outcome)
    assert verdict.guilty == {worker} and not verdict.disputed and verdict.outvoted == {Worker(1, 3)}
    assert verdict.flagged == {worker: 1} and verdict.audits == 1
    assert verdict.detections == (detected(worker, direction, 0.5, True),)


def test_where_nobody_can_tell_it_is_disputed() -> None:
    verdict = judged(Outcome.DISPUTED)
    assert not verdict.guilty and verdict.disputed == {CASE.audited}
    assert verdict.detections == (detected(CASE.audited, Direction.GRADIENT, 0.5, None),)


def test_a_contribution_that_matches_clears_who_was_out_of_line_and_says_nothing_of_others() -> None:
    verdict = judged(Outcome.MATCHES, score=3.0)
    assert not verdict.guilty and not verdict.flagged and verdict.audits == 1
    assert verdict.detections == (detected(CASE.audited, Direction.GRADIENT, 3.0, False),)
    assert judged(Outcome.MATCHES).detections == ()


@pytest.mark.parametrize(("replicas", "expected"), [(2, Outcome.DISPUTED), (3, Outcome.LIED), (6, Outcome.LIED)])
def test_one_is_asked_first_and_all_others_if_it_finds_another_contribution(replicas: int, expected: Outcome) -> None:
    rounds: list[set[Worker]] = []

    def ask(asked: list[tuple[ContributionCase, Worker]]) -> list[Outcome]:
        rounds.append({worker for _, worker in asked})
        return [Outcome.LIED if case.audited == Worker(1, 0) else Outcome.MATCHES for case, _ in asked]

    cases = [ContributionCase(lane, Worker(1, lane)) for lane in range(2)]
    found = Jury(Mesh(2, replicas), 0).hear_contributions(cases, (), (), STEP, ask)  # type: ignore[arg-type]
    assert {case: judgement.outcome for case, judgement in found.items()} == {cases[0]: expected}
    assert len(rounds) == 2 and rounds[0] | rounds[1] >= {Worker(1, replica) for replica in range(1, replicas)}
