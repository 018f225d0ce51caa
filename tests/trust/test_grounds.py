"""What evidence of each reason shows, and what it does not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_sentinel import cli
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.evidence import LIED, MATCHES, Evidence, Reason
from lightning_sentinel.trust.evidence_files import read_evidence, write_evidence
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment
from lightning_sentinel.trust.verify_evidence import verify_evidence
from lightning_sentinel.verification.streaks import Sighting, Streak
from tests.trust.cases import (
    EVERY_REASON,
    KEYS,
    NEXT_STAGE,
    SKETCH,
    STAGE,
    TWO_STAGES,
    flagged_step,
    of_a_contribution,
    of_a_false_note,
    of_a_false_row,
    of_a_forged_row,
    of_a_lie,
    of_contradictions,
    of_flags,
    of_unsigned_messages,
    part_of,
    row,
    vote_on_weights,
)
from tests.trust.statements import NOW, RUN, identity

PROVEN = ("lie", "two words", "false word", "weights", "row", "note", "contradictions", "forged row", "unsigned message")


def refuted(evidence: Evidence) -> str:
    findings = verify_evidence(evidence)
    assert not findings.holds and not findings.proves
    return findings.verdict


@pytest.mark.parametrize("name", EVERY_REASON)
def test_of_each_there_is_a_file_that_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = EVERY_REASON[name]()
    path = write_evidence(evidence, tmp_path)
    assert read_evidence(path) == evidence
    json.loads(path.read_text(), parse_constant=pytest.fail)
    findings = verify_evidence(evidence)
    assert findings.holds and findings.proves == (name in PROVEN)
    assert findings.verdict.startswith("The evidence holds: " if name in PROVEN else "This is a record and no proof: ")
    assert json.loads(path.read_text())["proof"].startswith("the signatures" if name in PROVEN else "none: ")
    cli.main(["verify-evidence", str(path)])
    assert capsys.readouterr().out == f"{findings}\n"


class TestWeightGradients:
    def test_in_words(self) -> None:
        words = f"{STAGE[0]} published in its row what it adds to the weight gradients of {STAGE[0]}, of step 12, attempt 0,"
        found = verify_evidence(of_a_contribution())
        assert found.verdict == f"The evidence holds: {words} and 3 of 5 live workers of its stage found it to be false."
        assert "vote on the weight gradients" in str(found) and "lied (error 0.8, tolerance 0.001)" in str(found)

    @pytest.mark.parametrize("outcomes", [{}, {2: LIED, 3: LIED}, {1: LIED, 2: LIED, 3: MATCHES, 4: MATCHES}])
    def test_fewer_than_most(self, outcomes: dict[int, int]) -> None:
        assert "nothing in it shows that" in refuted(of_a_contribution(outcomes))

    def test_votes_on_a_sketch_that_is_not_in_the_row(self) -> None:
        """Nor one that is there, and begins between two numbers."""
        evidence = of_a_contribution()
        for other in (SKETCH[:-1] + b"\x01", b"." + SKETCH[:-1]):
            votes = tuple(vote_on_weights(STAGE[replica], LIED, other) for replica in (2, 3, 4))
            says = "is not about weight gradients in a row of the evidence"
            assert says in refuted(dataclasses.replace(evidence, testimonies=votes))

    def test_without_the_row(self) -> None:
        evidence = of_a_contribution()
        for less in ({"contents": ()}, {"messages": (), "contents": ()}):
            assert "is not about weight gradients in a row" in refuted(dataclasses.replace(evidence, **less))

    def test_the_row_of_another(self) -> None:
        evidence = of_a_contribution()
        other = dataclasses.replace(evidence, messages=(row(STAGE[1], evidence.contents[0]),))
        assert "is not about weight gradients in a row" in refuted(other)

    def test_a_vote_of_the_accused_or_of_another_stage(self) -> None:
        keys = {**KEYS, NEXT_STAGE[0]: identity(NEXT_STAGE[0]).public}
        for juror in (STAGE[0], NEXT_STAGE[0]):
            evidence = dataclasses.replace(of_a_contribution({}), keys=keys, testimonies=(vote_on_weights(juror, LIED),))
            assert "is not about weight gradients in a row" in refuted(evidence)

    def test_it_is_no_evidence_of_a_false_signal(self) -> None:
        assert "nothing in it shows that" in refuted(dataclasses.replace(of_a_contribution(), reason=Reason.LIED))
        assert "nothing in it shows that" in refuted(dataclasses.replace(of_a_lie(), reason=Reason.CONTRIBUTION))

    def test_an_auditor_that_lied_about_it(self) -> None:
        evidence = dataclasses.replace(of_a_contribution(), reason=Reason.FALSE_WORD, banned=STAGE[1])
        assert f"{STAGE[1]} signed that the weight gradients of {STAGE[0]}" in verify_evidence(evidence).verdict


class TestRowsAndNotes:
    def test_in_words(self) -> None:
        found = verify_evidence(of_a_false_row()).verdict
        words = f"{NEXT_STAGE[0]} signed what {NEXT_STAGE[0]} reported of the activation signal from stage 1 to 2, lane 0,"
        assert f"{words} micro-batch 3, of step 12, attempt 0, and 3 of 5 live workers of its stage found it to be false" in found
        found = verify_evidence(of_a_false_note()).verdict
        words = f"{STAGE[0]} signed the activation note from stage 1 to 2, lane 0, micro-batch 3, of step 12, attempt 0,"
        assert f"{words} and 3 of 5 live workers of stage 3 found it to be false" in found

    def test_who_made_a_note_has_no_vote_on_it(self) -> None:
        """Two of three and three of four decide, as those of its own stage they would be outvoted or even."""
        assert verify_evidence(of_a_false_note({0: LIED, 1: LIED}, live=3)).proves
        assert verify_evidence(of_a_false_note({0: LIED, 1: LIED, 2: LIED}, live=4)).proves
        for few, live in (({0: LIED, 1: LIED}, 2), ({0: LIED, 1: LIED}, 4), ({0: LIED, 1: MATCHES}, 3)):
            assert "nothing in it shows that" in refuted(of_a_false_note(few, live))

    def test_fewer_than_most(self) -> None:
        assert "nothing in it shows that" in refuted(of_a_false_row({1: LIED, 2: LIED, 3: MATCHES, 4: MATCHES}))

    def test_neither_is_evidence_of_another_reason(self) -> None:
        for evidence in (of_a_false_row(), of_a_false_note()):
            for reason in (Reason.LIED, Reason.CONTRIBUTION, Reason.WITHHELD):
                assert "nothing in it shows that" in refuted(dataclasses.replace(evidence, reason=reason))

    def test_votes_of_another_stage(self) -> None:
        evidence = dataclasses.replace(of_a_false_row(), testimonies=of_a_lie().testimonies, keys=TWO_STAGES)
        assert "is not about a signal in the evidence" in refuted(evidence)


class TestContradictions:
    def test_in_words(self) -> None:
        found = verify_evidence(of_contradictions())
        names = ", ".join(map(str, NEXT_STAGE[:3]))
        assert f"{STAGE[0]} signed other words about messages between them than {names}, which are 3 of 5" in found.verdict
        assert any("no other worker of the stage was live" in one for one in found.limits)

    def test_as_many_as_can_be_malicious_show_nothing(self) -> None:
        assert "nothing in it shows that" in refuted(of_contradictions(others=2))

    def test_nor_do_rows_that_agree(self) -> None:
        assert "nothing in it shows that" in refuted(of_contradictions(lies="what it sent"))

    def test_nor_is_any_of_the_others_shown_to_lie(self) -> None:
        for other in NEXT_STAGE[:3]:
            assert "nothing in it shows that" in refuted(dataclasses.replace(of_contradictions(), banned=other))

    def test_rows_of_two_lanes_or_steps_do_not_contradict_each_other(self) -> None:
        for change in ({"lane": 1}, {"moment": Moment(RUN, 12, 1)}):
            messages, contents = [], []
            for other in NEXT_STAGE[:3]:
                own, others = {"moment": NOW, "lane": 0}, {"moment": NOW, "lane": 0, **change}
                said = part_of(STAGE[0], **own, sent="x"), part_of(other, **others)  # type: ignore[arg-type]
                messages += [row(STAGE[0], said[0], own["moment"]), row(other, said[1], others["moment"])]  # type: ignore[arg-type]
                contents += said
            evidence = dataclasses.replace(of_contradictions(), messages=tuple(messages), contents=tuple(contents))
            assert "nothing in it shows that" in refuted(evidence)

    def test_contents_that_nobody_signed(self) -> None:
        evidence = of_contradictions()
        contents = (*evidence.contents[:-1], evidence.contents[-1] + b"!")
        assert "contents[5], of" in refuted(dataclasses.replace(evidence, contents=contents))


class TestForgery:
    def test_in_words(self) -> None:
        found = verify_evidence(of_a_forged_row())
        says = "3 of 5 workers signed that they saw the table of step 12, attempt 0, in which the row of"
        assert found.verdict == f"The evidence holds: {says} {STAGE[0]} bears a signature that is not its own."
        assert "\nforged           row of step 12, attempt 0, by worker (stage 1, replica 0)" in str(found)

    def test_two_in_one_table(self) -> None:
        evidence = of_a_forged_row(forgers=(0, 1))
        for liar in STAGE[:2]:
            assert f"the row of {liar} bears a signature" in verify_evidence(dataclasses.replace(evidence, banned=liar)).verdict

    def test_that_few_saw(self) -> None:
        assert "nothing in it shows that" in refuted(of_a_forged_row(witnesses=2))

    def test_a_row_that_is_signed(self) -> None:
        assert "nothing in it shows that" in refuted(of_a_forged_row(forgers=()))

    def test_a_table_that_nobody_saw(self) -> None:
        """Whoever keeps the file may put any row into it, and any signature on it."""
        evidence = of_a_forged_row()
        other = Signed(evidence.messages[0].statement, bytes(64))
        changed = dataclasses.replace(evidence, messages=(other, *evidence.messages[1:]))  # type: ignore[arg-type]
        assert "nothing in it shows that" in refuted(changed)
        assert "bears no valid signature" in refuted(dataclasses.replace(evidence, banned=STAGE[1]))
        stranger = dataclasses.replace(evidence, keys={worker: key for worker, key in KEYS.items() if worker != STAGE[3]})
        assert "is of a worker whose key is not in the evidence" in refuted(stranger)

    def test_a_message_that_its_sender_did_not_sign(self) -> None:
        found = verify_evidence(of_unsigned_messages())
        assert "signed a row in which it says that it sent the activation signal from stage 1 to 2, lane 2" in found.verdict
        assert "nothing in it shows that" in refuted(of_unsigned_messages(unsigned=0))

    def test_a_row_without_any_signature_on_its_messages_cannot_be_read(self) -> None:
        """Nobody knows then which message is at which place of it."""
        assert "nothing in it shows that" in refuted(of_unsigned_messages(unsigned=2))


class TestFlags:
    def test_in_words(self) -> None:
        found = verify_evidence(of_flags())
        says = f"{STAGE[0]} was out of line in 5 consecutive steps in which it was verified, to step 9, and the rule bans after 5"
        assert f"nobody signed it. By what it says {says}" in found.verdict
        assert "who says so, because nobody signed it" in found.limits
        signed = verify_evidence(of_flags(signed=True))
        assert "1 workers signed the rows in it, and nobody recomputed what they say. By what" in signed.verdict
        assert "flagged          activation of step 9, lane 0, micro-batch 1, received by worker (stage 2, replica 0)" in str(
            signed
        )

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"steps": tuple(map(flagged_step, (3, 4, 5, 9)))}, "4 steps as a suspect are less than the rule asks for"),
            ({"habit": 0.4}, "5 steps as a suspect are less than the rule asks for"),
            ({"ban_after": 6}, "which bans after 6"),
            ({"steps": tuple(map(flagged_step, (3, 4, 5, 7, 7, 9)))}, "[3, 4, 5, 7, 7, 9], are not in order"),
            ({"steps": ()}, "[], are not in order"),
            ({"steps": (*map(flagged_step, (3, 4, 5, 7)), flagged_step(9, "xoo"))}, "less than half of what it sent in step 9"),
        ],
    )
    def test_numbers_from_which_the_ban_does_not_follow(self, change: dict[str, Any], says: str) -> None:
        assert says in refuted(of_flags(**change))

    def test_suspects_beside_it_take_more_steps(self) -> None:
        """Where others are suspects in two of five steps a streak of n has the chance 0.42 ** n, to be at most (1 / 12) ** 5."""
        others = tuple(STAGE[1:])

        def streak(length: int) -> Evidence:
            seen = [Sighting(others if 5 * number < 2 * length else (), others, False) for number in range(length)]
            steps = tuple(flagged_step(number)._replace(seen=seen[number]) for number in range(length))
            return dataclasses.replace(of_flags(steps=steps), step=length - 1)

        enough = next(n for n in range(5, 99) if ((math.ceil(0.4 * n) + 0.5) / (n + 1)) ** n <= (1 / 12) ** 5)
        assert enough > 10 and "less than the rule asks for" in refuted(streak(enough - 1))
        assert verify_evidence(streak(enough)).holds

    def test_earlier_steps_that_were_not_kept_count(self) -> None:
        earlier = Streak(steps=3)
        assert "2 steps as a suspect" in refuted(of_flags((7, 9)))
        assert verify_evidence(of_flags((7, 9), earlier=earlier.state())).holds

    def test_a_row_that_its_receiver_did_not_report(self) -> None:
        evidence = of_flags(signed=True)
        assert evidence.record is not None
        steps = list(evidence.record.steps)
        signal = steps[2].signals[1]._replace(row=bytes(len(steps[2].signals[1].row)))
        steps[2] = steps[2]._replace(signals=(steps[2].signals[0], signal))
        changed = dataclasses.replace(evidence, record=dataclasses.replace(evidence.record, steps=tuple(steps)))
        assert f"the row that {NEXT_STAGE[0]} signed in step 5 says something else of lane 0" in refuted(changed)

    def test_a_signal_of_another_stage(self) -> None:
        assert "has a signal that stage 3 does not send" in refuted(dataclasses.replace(of_flags(), banned=Worker(3, 0)))
