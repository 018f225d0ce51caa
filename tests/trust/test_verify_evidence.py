from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_sentinel import cli
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason, Testimony
from lightning_sentinel.trust.evidence_files import read_evidence, write_evidence
from lightning_sentinel.trust.signing import Signed, sign
from lightning_sentinel.trust.statements import Moment
from lightning_sentinel.trust.verify_evidence import verify_evidence
from tests.trust.cases import KEYS, STAGE, of_a_contradiction, of_a_false_word, of_a_lie, signal, testimony, votes
from tests.trust.statements import ROW, RUN, digest, identity

LIE = "activation signal from stage 1 to 2, lane 0, micro-batch 3, of step 12, attempt 0"


def refuted(evidence: Evidence, **options: Any) -> str:
    findings = verify_evidence(evidence, **options)
    assert not findings.holds
    assert findings.verdict.startswith(f"The evidence does not hold: {findings.faults[0]}. Compare it with the file in ")
    assert not findings.proves
    return findings.verdict


class TestWhatHolds:
    def test_a_lie_that_most_found(self) -> None:
        findings = verify_evidence(of_a_lie())
        assert findings.holds
        says = f"{STAGE[0]} signed the {LIE}, and 3 of 5 live workers of its stage found it to be false"
        assert findings.verdict == f"The evidence holds: {says}."
        assert [said.key for said in findings.statements] == [KEYS[worker] for worker in STAGE]
        assert not any(said.fault for said in findings.statements)

    def test_its_text(self) -> None:
        lines = str(verify_evidence(of_a_lie())).splitlines()
        assert lines[1].startswith(f"verifies         {LIE}, by {STAGE[0]}: sha256:")
        assert lines[2] == f"verifies         vote on the {LIE}, by {STAGE[1]}: matches (error 1e-06, tolerance 0.001)"
        assert lines[3] == f"verifies         vote on the {LIE}, by {STAGE[2]}: lied (error 0.8, tolerance 0.001)"
        assert lines[-3] == f"{STAGE[4]} signs with {KEYS[STAGE[4]]}"
        assert lines[-2].startswith("Not verified: whose keys these are; compare them")
        assert lines[-1].startswith("Not verified: that voters recomputed what they say")
        assert len(lines) == 1 + 5 + 5 + 2

    def test_a_contradiction(self) -> None:
        findings = verify_evidence(of_a_contradiction())
        assert (
            findings.verdict
            == f"The evidence holds: {STAGE[0]} signed two different statements, each of which is the {LIE}, by {STAGE[0]}."
        )

    def test_a_contradiction_of_rows(self) -> None:
        rows = tuple(sign(identity(STAGE[0]), dataclasses.replace(ROW, row=digest(one))) for one in ("one", "another"))
        evidence = Evidence(STAGE[0], Reason.CONTRADICTED_ITSELF, 12, KEYS, rows, ())
        assert verify_evidence(evidence).holds

    def test_a_contradiction_of_votes(self) -> None:
        said = votes(signal(), {1: LIED}) + votes(signal(), {1: MATCHES})
        assert verify_evidence(Evidence(STAGE[1], Reason.CONTRADICTED_ITSELF, 12, KEYS, (signal(),), said)).holds

    def test_a_false_word(self) -> None:
        verdict = verify_evidence(of_a_false_word()).verdict
        assert verdict.startswith(f"The evidence holds: {STAGE[1]} signed that the activation signal from stage 1 to 2, lane 2")
        # A sender stands by its signal, so that two who say that it is true are three.
        assert "is false, and 3 of 5 live workers of its stage signed the opposite; worker" in verdict
        assert verdict.endswith("is true, and 3 of 5 live workers of its stage signed the opposite.")

    def test_an_accomplice_does_not_spoil_it(self) -> None:
        """Whatever it says about the number of workers, or how often it votes."""
        lie = of_a_lie()
        for more in (votes(signal(), {1: MATCHES}, live=1), votes(signal(), {1: MATCHES}, live=999), votes(signal(), {1: LIED})):
            assert verify_evidence(dataclasses.replace(lie, testimonies=lie.testimonies[1:] + more)).holds
            assert verify_evidence(dataclasses.replace(lie, testimonies=lie.testimonies + more)).holds

    def test_known_workers(self) -> None:
        assert verify_evidence(of_a_lie(), known=set(KEYS.values())).holds
        says = f"the key of {STAGE[3]}, {KEYS[STAGE[3]]}, is not on the list of known workers"
        assert says in refuted(of_a_lie(), known=[key for worker, key in KEYS.items() if worker != STAGE[3]])


class TestWhatIsNoReason:
    @pytest.mark.parametrize(
        "evidence",
        [
            of_a_lie({1: LIED, 2: LIED, 3: MATCHES, 4: MATCHES}),
            of_a_lie({2: LIED, 3: LIED}),
            of_a_lie({1: LIED, 2: LIED, 3: LIED}, live=6),
            of_a_lie({1: LIED}, live=2),
            of_a_lie({}),
        ],
        ids=["outvoted", "two of five", "three of six", "one of two", "none"],
    )
    def test_fewer_than_most(self, evidence: Evidence) -> None:
        says = f"nothing in it shows that {STAGE[0]} sent a signal that most workers of its stage found to be false"
        assert says in refuted(evidence)

    def test_one_vote_several_times(self) -> None:
        lie = of_a_lie({2: LIED})
        says = f"the vote on the {LIE}, by {STAGE[2]} is in it more than once"
        assert says in refuted(dataclasses.replace(lie, testimonies=lie.testimonies * 5))

    def test_two_who_say_that_there_are_but_three(self) -> None:
        """Against three who say that there are five."""
        lie = of_a_lie({1: MATCHES, 4: MATCHES})
        conspiracy = votes(signal(), {2: LIED, 3: LIED}, live=3)
        assert "nothing in it shows" in refuted(dataclasses.replace(lie, testimonies=conspiracy + lie.testimonies))

    def test_a_stage_that_is_not_named_as_a_whole(self) -> None:
        few = {worker: key for worker, key in KEYS.items() if worker != STAGE[1]}
        evidence = dataclasses.replace(of_a_lie({2: LIED, 3: LIED, 4: LIED}), keys=few)
        assert "nothing in it shows" in refuted(evidence)

    def test_a_vote_of_the_accused_or_of_another_stage(self) -> None:
        stranger = Worker(2, 0)
        keys = {**KEYS, stranger: identity(stranger).public}
        for juror in (STAGE[0], stranger):
            said = (testimony(signal(), juror, LIED),)
            assert "is not about a signal in the evidence" in refuted(Evidence(STAGE[0], Reason.LIED, 12, keys, (signal(),), said))

    @pytest.mark.parametrize("reason", [Reason.CONTRADICTED_ITSELF, Reason.FALSE_WORD])
    def test_another_reason(self, reason: Reason) -> None:
        assert "nothing in it shows" in refuted(dataclasses.replace(of_a_lie(), reason=reason))

    def test_another_worker(self) -> None:
        for evidence in (of_a_lie(), of_a_false_word()):
            assert "nothing in it shows" in refuted(dataclasses.replace(evidence, banned=STAGE[3]))
        assert "it has no key of worker (stage 3, replica 0)" in refuted(dataclasses.replace(of_a_lie(), banned=Worker(3, 0)))

    def test_another_step(self) -> None:
        assert "it names step 13, and the latest statement in it is of step 12" in refuted(dataclasses.replace(of_a_lie(), step=13))

    def test_statements_of_two_attempts_are_no_contradiction(self) -> None:
        messages = (signal(), signal(moment=Moment(RUN, 12, 1), digest=digest("another signal")))
        assert "nothing in it shows" in refuted(dataclasses.replace(of_a_contradiction(), messages=messages))

    def test_statements_of_two_runs(self) -> None:
        messages = (*of_a_contradiction().messages, signal(moment=Moment(bytes(16), 12, 0)))
        assert "its statements are of several runs, 00000000 and 00010203" in refuted(
            dataclasses.replace(of_a_contradiction(), messages=messages)
        )

    def test_two_workers_with_one_key(self) -> None:
        keys = {**KEYS, STAGE[4]: KEYS[STAGE[3]]}
        assert f"{STAGE[3]} and {STAGE[4]} have the same key in it" in refuted(dataclasses.replace(of_a_lie(), keys=keys))


class TestWhatDoesNotVerify:
    def test_a_message_that_the_accused_did_not_sign(self) -> None:
        forged = sign(identity(STAGE[3]), signal().statement)
        evidence = dataclasses.replace(of_a_lie(), messages=(forged,))
        assert f"the {LIE}, by {STAGE[0]}: sha256:" in refuted(evidence)
        assert f"bears no valid signature of {KEYS[STAGE[0]]}" in refuted(evidence)

    def test_a_vote_that_was_changed(self) -> None:
        lie = of_a_lie()
        vote = lie.testimonies[0].vote
        turned = Signed(dataclasses.replace(vote.statement, outcome=LIED), vote.signature)
        changed = (Testimony(turned, lie.testimonies[1].recomputation), *lie.testimonies[1:])
        says = refuted(dataclasses.replace(lie, testimonies=changed))
        assert f"the vote on the {LIE}, by {STAGE[1]}: lied (error 0.8, tolerance 0.001) bears no valid signature" in says

    def test_a_vote_on_another_signal(self) -> None:
        """It cannot be used against a signal at the same place that its juror never saw."""
        other = signal(digest=digest("another signal"))
        evidence = dataclasses.replace(of_a_lie(), testimonies=votes(other, {2: LIED, 3: LIED, 4: LIED}))
        assert "is not about a signal in the evidence" in refuted(evidence)

    @pytest.mark.parametrize(("outcome", "error"), [(LIED, 1e-5), (LIED, 1e-3), (MATCHES, 0.1)])
    def test_a_vote_against_its_own_finding(self, outcome: int, error: float) -> None:
        evidence = of_a_lie()
        odd = testimony(signal(), STAGE[1], outcome, error=error)
        says = refuted(dataclasses.replace(evidence, testimonies=(*evidence.testimonies, odd)))
        assert "does not follow from its own recomputation" in says

    def test_a_vote_without_a_finding(self) -> None:
        bare = dataclasses.replace(of_a_lie().testimonies[1], recomputation=None)
        assert "was signed for another recomputation" in refuted(dataclasses.replace(of_a_lie(), testimonies=(bare,)))


EDITS: dict[str, Any] = {
    "another worker": (lambda c: c["banned"].update(replica=3), "nothing in it shows that worker (stage 1, replica 3)"),
    "another reason": (lambda c: c.update(reason="false word"), "nothing in it shows"),
    "another step": (lambda c: c.update(step=11), "it names step 11, and the latest"),
    "another key": (
        lambda c: c["keys"][0].update(key=str(identity(Worker(7, 7)).public)),
        f"the {LIE}, by worker (stage 1, replica 0)",
    ),
    "keys exchanged": (
        lambda c: (c["keys"][2].update(replica=3), c["keys"][3].update(replica=2)),
        "by worker (stage 1, replica 2): lied (error 0.8, tolerance 0.001) bears no valid signature",
    ),
    "a juror left out": (lambda c: c["testimonies"].pop(), "nothing in it shows"),
    "a replica left out": (
        lambda c: c["keys"].pop(),
        "by worker (stage 1, replica 4): lied (error 0.8, tolerance 0.001) is of a worker whose key",
    ),
    "another error": (
        lambda c: c["testimonies"][2]["recomputation"].update(error=0.7),
        "by worker (stage 1, replica 3): lied (error 0.7, tolerance 0.001) was signed for another recomputation",
    ),
    "another tolerance": (
        lambda c: c["testimonies"][2]["recomputation"].update(tolerance=0.5),
        "by worker (stage 1, replica 3): lied (error 0.8, tolerance 0.5) was signed for another recomputation",
    ),
    "another result": (
        lambda c: c["testimonies"][2]["recomputation"].update(recomputed=c["testimonies"][1]["recomputation"]["recomputed"]),
        "by worker (stage 1, replica 3): lied (error 0.8, tolerance 0.001) was signed for another recomputation",
    ),
    "no result": (lambda c: c["testimonies"][3].update(recomputation=None), "by worker (stage 1, replica 4): lied was signed for"),
    "a message left out": (lambda c: c["messages"].clear(), "is not about a signal in the evidence"),
    "a vote twice for another": (
        lambda c: c["testimonies"][0].update(vote=c["testimonies"][1]["vote"]),
        "by worker (stage 1, replica 2): lied (error 1e-06, tolerance 0.001) was signed for another recomputation",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_was_edited(name: str, tmp_path: Path) -> None:
    change, says = EDITS[name]
    path = write_evidence(of_a_lie(), tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert says in refuted(read_evidence(path))


def test_every_character_of_a_statement_counts(tmp_path: Path) -> None:
    """Any other character in a signed statement is refused when it is read, or does not verify."""
    path = write_evidence(of_a_lie(), tmp_path)
    content = json.loads(path.read_text())
    for place in range(0, len(content["messages"][0]) - 2, 7):
        text = content["messages"][0]
        other = "A" if text[place] != "A" else "B"
        edited = {**content, "messages": [text[:place] + other + text[place + 1 :]]}
        path.write_text(json.dumps(edited))
        try:
            evidence = read_evidence(path)
        except ValueError as error:
            assert "messages[0]" in str(error)
            continue
        assert "bears no valid signature" in refuted(evidence) or "whose key is not in the evidence" in refuted(evidence)


class TestCommand:
    def test_of_evidence_that_holds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_evidence(of_a_lie(), tmp_path)
        cli.main(["verify-evidence", str(path)])
        text = capsys.readouterr().out
        assert text == f"{verify_evidence(of_a_lie())}\n"

    def test_of_evidence_that_does_not(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_evidence(of_a_lie({2: LIED}), tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify-evidence", str(path)])
        assert str(ended.value.code).startswith("The evidence does not hold: nothing in it shows")
        assert capsys.readouterr().out == ""

    def test_of_what_is_no_evidence(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify-evidence", str(tmp_path / "absent.json")])
        assert str(ended.value.code).startswith(f"ConfigurationError: {tmp_path / 'absent.json'} cannot be read")

    def test_with_a_list_of_known_workers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_evidence(of_a_lie(), tmp_path)
        known = tmp_path / "known_workers"
        known.write_text("".join(f"{key} {worker}\n" for worker, key in KEYS.items()))
        cli.main(["verify-evidence", str(path), "--known-workers", str(known)])
        assert "The evidence holds" in capsys.readouterr().out
        known.write_text(f"{KEYS[STAGE[0]]}\n")
        with pytest.raises(SystemExit, match="is not on the list of known workers"):
            cli.main(["verify-evidence", str(path), "--known-workers", str(known)])
