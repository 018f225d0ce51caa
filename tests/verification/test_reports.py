"""Rows and notes that are not what they must be, and honest ones that other devices compute a little differently."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.verification import COLUMNS
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.fences import Fences, fit_fences
from lightning_sentinel.verification.jury import Case, Decision, Subject
from lightning_sentinel.verification.majority import Judgement
from lightning_sentinel.verification.outcomes import Outcome
from lightning_sentinel.verification.projection import Projection, SecretDirections
from lightning_sentinel.verification.reports import is_false_note, is_false_row, with_reports
from lightning_sentinel.verification.verifier import BoundaryVerifier
from lightning_sentinel.wiring import MicroBatchId
from tests.verification.steps import MICRO_BATCHES, Step

SAMPLES, POSITIONS, CHANNELS = 2, 16, 64
BOUNDARY = Boundary(1, Direction.ACTIVATION)
CONFIG = Verification(seed=0)
SECRET = SecretDirections(BOUNDARY, CONFIG)
HONEST = torch.tensor([False])
OPEN = Fences.open(len(FEATURES))


def as_tf32(values: Tensor) -> Tensor:
    """Rounded to ten bits of fraction, as the factors of a product on a GPU may be."""
    return ((values.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Seen:
    """A boundary with a past: signals of a stage that changes what it receives by about ``change``."""

    def __init__(self, change: float, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.change, self.dtype = change, dtype
        self.weights = self.draw(CHANNELS, CHANNELS) / CHANNELS**0.5
        self.verifier = BoundaryVerifier(BOUNDARY, CONFIG)
        features = []
        for _ in range(24):
            sent, note = self.signal()
            rows, _ = self.verifier.inspect(sent, HONEST, note)
            features.append(rows[0, : len(FEATURES)])
            self.verifier.learn(self.verifier.contribution(~HONEST, HONEST))
        watched = torch.ones(len(FEATURES), dtype=torch.bool)
        self.fences = fit_fences(torch.stack(features[12:]), 0.01, True, watched)
        self.verifier.fences = self.fences

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def signal(self) -> tuple[Tensor, Projection]:
        received = self.draw(SAMPLES, POSITIONS, CHANNELS)
        sent = received + self.change * torch.tanh(received @ self.weights)
        return sent.to(self.dtype), SECRET.project(received.to(self.dtype))

    def is_false(self, told: Tensor, again: Tensor, fences: Fences | None = None) -> bool:
        fences = self.fences if fences is None else fences
        return is_false_row(told, again, fences, fences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [1.0, 0.1, 0.01, 0.001])
def test_no_honest_receiver_is_found_to_lie_because_devices_round_differently(change: float, dtype: torch.dtype) -> None:
    seen = Seen(change, dtype)
    rounded = BoundaryVerifier(BOUNDARY, CONFIG)
    rounded.references, rounded.fences = seen.verifier.references, seen.fences
    # A device that rounds factors: directions and signals alike.
    secret = SecretDirections(BOUNDARY, CONFIG)
    secret.projection(CHANNELS).copy_(as_tf32(secret.projection(CHANNELS)))
    for _ in range(8):
        (sent, note), (other, other_note) = seen.signal(), seen.signal()
        alone = seen.verifier.measure_again(sent, HONEST, note)[0]
        both = Projection(torch.cat((other_note.values, note.values)), note.channels)
        beside = seen.verifier.measure_again(torch.cat((other, sent)), HONEST.repeat(2), both)[1]
        elsewhere = rounded.measure_again(as_tf32(sent), HONEST, note)[0]
        for told in (beside, elsewhere):
            assert not seen.is_false(told, alone)
        assert not is_false_note(secret.project(as_tf32(sent)).values, SECRET.project(sent).values)


def test_what_is_measured_again_is_what_was_reported_and_nothing_is_kept_of_it() -> None:
    seen = Seen(0.3)
    sent, note = seen.signal()
    told = seen.verifier.inspect(sent, HONEST, note).rows
    before = seen.verifier.contribution(~HONEST, HONEST).flat()
    assert torch.equal(seen.verifier.measure_again(sent, HONEST, note), told)
    assert torch.equal(seen.verifier.contribution(~HONEST, HONEST).flat(), before)


LIES: dict[str, Any] = {
    "a feature": {"norm": 1.0},
    "no change": {"change": -0.5},
    "taint": {"tainted": 1.0},
    "score": {"score": 0.5},
    "not finite": {"worst": -100.0},
    "size": {"positions": 1.0},
    "nan": {"norm": math.nan},
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_not_rounding_is_a_lie(lie: str) -> None:
    seen = Seen(0.3)
    sent, note = seen.signal()
    true = seen.verifier.measure_again(sent, HONEST, note)[0]
    told = true.clone()
    for name, difference in LIES[lie].items():
        told[COLUMNS.index(name)] += difference
    assert seen.is_false(told, true)
    assert not seen.is_false(true.clone(), true)


def test_before_there_are_fences_a_row_may_be_off_by_a_quarter() -> None:
    seen = Seen(0.3)
    seen.verifier.fences = OPEN
    sent, note = seen.signal()
    true = seen.verifier.measure_again(sent, HONEST, note)[0]
    told = [true.clone() for _ in range(2)]
    for row, difference in zip(told, (0.24, 0.26)):
        row[FEATURES.index("norm")] += difference
    assert [seen.is_false(row, true, OPEN) for row in told] == [False, True]


def test_a_signal_that_is_not_finite_has_any_features() -> None:
    seen = Seen(0.3)
    sent, note = seen.signal()
    true = seen.verifier.measure_again(sent * torch.nan, HONEST, note)[0]
    assert not seen.is_false(true.clone(), true)
    assert seen.is_false(seen.verifier.measure_again(sent, HONEST, note)[0], true), "who hides it lies"


@pytest.mark.parametrize(("off", "false"), [(0.0, False), (0.0005, False), (0.002, True), (math.nan, True)])
def test_a_note_may_be_off_by_a_thousandth(off: float, false: bool) -> None:
    _, note = Seen(0.3).signal()
    assert bool(is_false_note(note.values * (1 + off), note.values)) == false


# --- What follows


def decided(subject: Subject, audited: Worker, outcome: Outcome, outvoted: Worker | None = None) -> Decision:
    case = Case(BOUNDARY, 1, 2, MicroBatchId(1, 2), audited, subject)
    return Decision(case, Judgement(outcome, frozenset() if outvoted is None else frozenset({outvoted})))


def test_who_reports_falsely_is_guilty_and_what_it_spoilt_is_not_learned_from() -> None:
    nobody = torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool)
    step, mesh = Step(), Mesh(4, 3)
    verdict, _ = step.audited(nobody)
    assert with_reports(verdict, mesh, 7) is verdict
    receiver, maker, juror = Worker(2, 1), Worker(0, 1), Worker(2, 0)
    reports = (decided(Subject.ROW, receiver, Outcome.LIED, juror), decided(Subject.NOTE, maker, Outcome.DISPUTED))
    found = with_reports(replace(verdict, reports=reports), mesh, 7)
    assert (found.guilty, found.disputed, found.outvoted) == ({receiver}, {maker}, {juror})
    assert found.flagged == Counter({receiver: 1, maker: 1})
    assert [(d.worker, d.feature, d.confirmed, d.micro_batch) for d in found.detections] == [
        (receiver, "row", True, 2),
        (maker, "note", None, 2),
    ]
    place = mesh.boundaries.index(BOUNDARY), 1, 2
    assert verdict.honest[place] and not found.honest[place] and not found.heard[place]
    assert found.honest.sum() == verdict.honest.sum() - 1


def test_a_report_that_most_confirm_blames_who_denied_it() -> None:
    verdict, _ = Step().audited(torch.zeros(6, 3, MICRO_BATCHES, dtype=torch.bool))
    juror = Worker(2, 0)
    found = with_reports(replace(verdict, reports=(decided(Subject.ROW, Worker(2, 1), Outcome.MATCHES, juror),)), Mesh(4, 3), 7)
    assert (found.guilty, found.disputed, found.outvoted) == (set(), set(), {juror})
    assert not found.detections and torch.equal(found.honest, verdict.honest)
