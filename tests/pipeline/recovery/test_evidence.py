"""Every ban leaves evidence: by contradictions, forged rows, weight gradients, and flags."""

from __future__ import annotations

import json
import sys
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import SignedRow, Transcript
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.exchange import Exchange
from lightning_sentinel.pipeline.recovery.evidence import BanEvidence, Heard, of_audits
from lightning_sentinel.pipeline.recovery.flag_records import row_in
from lightning_sentinel.pipeline.recovery.votes import sketch_bytes
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm
from lightning_sentinel.trust.evidence import Evidence, Reason
from lightning_sentinel.trust.evidence_files import read_evidence
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.statements import Moment
from lightning_sentinel.trust.verify_evidence import verify_evidence
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.table import COLUMNS
from tests.pipeline.ranks import ranks
from tests.pipeline.recovery.audited import ATTACKS, LIARS, Run
from tests.pipeline.recovery.test_contribution_audits import contributing
from tests.pipeline.recovery.toys import credentials
from tests.trust.cases import NEXT_STAGE, STAGE, part_of, row
from tests.trust.statements import RUN, identity

MESH = Mesh(3, 5)


def ruling(step: int, banned: list[Worker], **said: Any) -> Ruling:
    plan = plan_step("training_step", MESH, BatchSizes(2, (4,) * 5), number=step, run=step)
    return Ruling(None, banned, [], redo=True, plan=plan, **said)  # type: ignore[arg-type]


class Told:
    """A transcript with these rows."""

    credentials = Credentials(RUN, Algorithm.SHA256, keys={worker: identity(worker).public for worker in MESH.workers})

    def __init__(self) -> None:
        self.now: dict[Worker, SignedRow] = {}

    def rows(self) -> dict[Worker, SignedRow]:
        return self.now


def test_contradictions_are_collected_over_the_steps_and_shown_when_there_are_enough() -> None:
    told, liar, ledger = Told(), STAGE[0], Ledger()
    collected = BanEvidence(MESH, told)  # type: ignore[arg-type]
    seen: list[list[Worker]] = []
    for step, other in enumerate(NEXT_STAGE[:3]):
        # Beside another one in each step, of which the second contradicts it twice.
        for again in range(1 + (step == 1)):
            moment = Moment(RUN, step, 2 * step + again)
            said = {liar: part_of(liar, moment, step, sent="something else"), other: part_of(other, moment, step)}
            told.now = {worker: SignedRow(row(worker, part, moment), part) for worker, part in said.items()}
            banned = ledger.record_contradictions(step, [(liar, other)], (), MESH)
            seen.append(banned)
            found = collected.of_contradictions(ruling(step, banned, contradictions=[(liar, other)])).evidence
            assert set(found) == set(banned)
    assert seen == [[], [], [], [liar]]
    findings = verify_evidence(found[liar])
    assert findings.proves and found[liar].reason is Reason.CONTRADICTED_OTHERS and len(found[liar].contents) == 6
    assert {worker.stage for worker in found[liar].keys} == {1, 2}


def test_of_rows_that_cannot_be_read_the_ban_is_told_and_nothing_shown() -> None:
    told, liar = Told(), STAGE[0]
    collected = BanEvidence(MESH, told)  # type: ignore[arg-type]
    for step, other in enumerate(NEXT_STAGE[:3]):
        told.now = {worker: SignedRow(row(worker, b"a row", Moment(RUN, step, step)), b"a row") for worker in (liar, other)}
        found = collected.of_contradictions(ruling(step, [liar] if step == 2 else [], contradictions=[(liar, other)])).evidence
    assert found[liar] == Evidence(liar, Reason.CONTRADICTED_OTHERS, 2, {}, (), ())
    assert (
        "contradicts more workers of one stage than can be malicious there, and nothing in it"
        in verify_evidence(found[liar]).verdict
    )


def test_what_is_collected_is_bounded() -> None:
    told = Told()
    mesh = Mesh(2, 40)
    collected = BanEvidence(mesh, told)  # type: ignore[arg-type]
    one = SignedRow(row(STAGE[0], b"a row"), b"a row")
    told.now = dict.fromkeys(mesh.workers, one)
    pairs = [(Worker(0, a), Worker(1, b)) for a in range(40) for b in range(40)]
    collected.of_contradictions(ruling(0, [], contradictions=pairs))
    assert len(collected._pairs) == 256


def test_a_forged_row_is_shown_with_those_that_say_which_table_they_saw() -> None:
    """Between ranks that are threads, of which one signs with another key."""
    mesh, forger = Mesh(2, 2), Worker(0, 1)

    def work(rank: int) -> Evidence:
        own = credentials(mesh, mesh.worker(rank))
        if mesh.worker(rank) == forger:
            own = Credentials(RUN, own.algorithm, Identity.seeded(1, "stolen"), own.keys)
        transcript = Transcript(mesh, own)
        for step in range(3):
            table = transcript.exchange(Moment(RUN, step, step), bytes([rank, step]))
        assert table.forgers == {forger}
        evidence = BanEvidence(mesh, transcript).of_contradictions(ruling(2, [forger], forgers=table.forgers)).evidence
        return evidence[forger]

    with ranks(mesh.size) as world:
        first, *others = world.run(work)
    assert all(one == first for one in others)
    findings = verify_evidence(first, known=set(credentials(mesh, forger).keys.values()))
    assert "3 of 4 workers signed that they saw the table of step 1, attempt 1, in which the row of" in findings.verdict


@pytest.mark.parametrize("signs", [True, False])
def test_false_weight_gradients_are_shown_with_the_row_that_publishes_them(signs: bool) -> None:
    liar = Worker(1, 2)
    toy = contributing(replicas=5, signs=signs)
    assert set(toy.heard({liar: torch.neg}, audited=[liar])) == {liar}
    held = credentials(toy.mesh, Worker(1, 0), signs)
    said = b"scores.." + sketch_bytes(toy.table[1, 2]) + b"what it sent"
    own = row(liar, said, Moment(RUN, 3, 1))
    heard = Heard(StepCommitments(), {}, toy.on_weights, {liar: SignedRow(own, said)})
    (evidence,) = of_audits({liar: Reason.CONTRIBUTION}, 3, heard, held).values()
    findings = verify_evidence(evidence)
    assert (findings.holds, findings.proves, len(evidence.testimonies)) == (True, signs, 4)
    assert "4 of 5 live workers of its stage found it to be false" in findings.verdict
    # What voters sign is the error of the sketch, which here is that of a sign.
    assert {found.recomputation and round(found.recomputation.error, 6) for found in evidence.testimonies} == {2.0}
    assert len({found.recomputation and found.recomputation.recomputed for found in evidence.testimonies}) == 1


@pytest.mark.parametrize("neighbour", [0, 2])
def test_so_is_who_kept_an_auditor_of_weight_gradients_from_what_it_had_sent(neighbour: int) -> None:
    toy = contributing(replicas=5)
    audited, guilty = Worker(1, 1), Worker(neighbour, 1)
    toy.of(neighbour, 1).sent[ls.Direction.ACTIVATION if neighbour == 0 else ls.Direction.GRADIENT, 1] = torch.zeros(3, 4)
    toy.heard(audited=[audited])
    said = sketch_bytes(toy.table[1, 1])
    rows = {audited: SignedRow(row(audited, said, Moment(RUN, 3, 1)), said)}
    heard = Heard(toy.commitments, {}, toy.on_weights, rows)
    found = of_audits(dict.fromkeys([guilty, Worker(neighbour, 0)], Reason.LIED), 3, heard, credentials(toy.mesh, audited))
    assert found[guilty].reason is Reason.WITHHELD and verify_evidence(found[guilty]).proves
    assert f"it was for {guilty} to give it to them" in verify_evidence(found[guilty]).verdict
    assert not verify_evidence(found[Worker(neighbour, 0)]).proves


def test_rows_are_recorded_as_they_were_reported_whatever_is_believed_of_them() -> None:
    rows = {boundary: torch.rand(1, 2, len(COLUMNS)) for boundary in MESH.boundaries if boundary.receiver == 1}
    for reported in rows.values():
        reported[0, 1] = torch.nan
    said = Exchange(MESH, torch.device("cpu"), Told())._padded_rows(rows, 3).numpy().tobytes() + b"and more"  # type: ignore[arg-type]
    for boundary, reported in rows.items():
        for slot in range(2):
            assert row_in(said, boundary.direction, slot, 3) == reported[0, slot].numpy().tobytes()


class TestOnTheVirtualMesh:
    @pytest.mark.parametrize(
        ("attack", "reason"),
        [
            (ATTACKS["loud"], Reason.LIED),
            ("gradient_contribution", Reason.CONTRIBUTION),
            ("false_notes", Reason.NOTE),
            ({"name": "false_rows", "hide": None, "invent": 1.0}, Reason.ROW),
        ],
        ids=str,
    )
    def test_bans_by_audits_are_signed_by_its_workers(self, attack: Any, reason: Reason) -> None:
        liars = [Worker(0, 1), Worker(0, 2)] if reason is Reason.NOTE else LIARS
        runs = [Run(attack, liars) for _ in range(1 if reason in (Reason.ROW, Reason.NOTE) else 2)]
        evidence = dict(runs[0].strategy.evidence)
        assert set(evidence) == set(liars) == set(runs[0].ledger.banned)
        # Keys are drawn from the seed, so that a repeated run says the same.
        assert all(evidence == run.strategy.evidence for run in runs)
        for worker, one in evidence.items():
            findings = verify_evidence(one)
            assert findings.proves and one.reason is reason, findings.verdict
            assert one.step == runs[0].ledger.banned_at[worker]
            assert runs[0].ledger.evidence[worker].endswith(f"stage-{worker.stage}-replica-{worker.replica}.json")

    @pytest.mark.parametrize(
        ("signs", "attack", "start"), [(True, ATTACKS["loud"], 20), (False, lambda signal, _: signal * nan, 3)]
    )
    def test_bans_by_flags_leave_a_record(
        self, signs: bool, attack: Any, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not signs:
            monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
        settings = {"rate": None, "warmup": start, "start": start, "steps": start + 4, "response": {"ban_after": 3}}
        run = Run(attack, LIARS[:1], **settings, logger=CSVLogger(tmp_path, name=""))
        (worker,) = run.ledger.banned
        ((accused, evidence),) = run.strategy.evidence.items()
        assert accused == worker
        if not signs:
            monkeypatch.undo()
        findings = verify_evidence(evidence)
        assert (evidence.reason, findings.holds, findings.proves) == (Reason.FLAGGED, True, False), findings.verdict
        assert ("nobody signed it" in findings.verdict) == (not signs)
        record = evidence.record
        assert record is not None and record.steps[-1].step == run.ledger.banned_at[worker] == evidence.step
        folder = tmp_path / "version_0" / "sentinel"
        (entry,) = json.loads((folder / "ledger.json").read_text())["banned"]
        assert read_evidence(folder / entry["evidence"]) == evidence
        assert run.ledger.state_dict()["evidence"] == [[worker.stage, worker.replica, entry["evidence"]]]
        assert record.streak.state() == run.ledger.streaks[worker].state()
        flagged = {
            (one.step, s.boundary.direction, s.slot, s.score, s.feature) for one in record.steps for s in one.signals if s.flagged
        }
        steps = {one.step for one in record.steps}
        detections = [one for one in run.strategy.detections if one.worker == worker and one.step in steps]
        assert flagged == {(one.step, one.direction, one.micro_batch, one.score, one.feature) for one in detections}
