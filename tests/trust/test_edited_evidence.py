"""Evidence that was edited, or is none: what is said of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel import cli
from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.trust.evidence import LIED, Evidence
from lightning_sentinel.trust.evidence_files import read_evidence, write_evidence
from lightning_sentinel.trust.fields import as_text, of_bytes
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment
from lightning_sentinel.trust.verify_evidence import verify_evidence
from tests.trust.cases import (
    EVERY_REASON,
    STAGE,
    of_a_lie,
    of_flags,
    row,
    vote_on_weights,
)

PROVEN = ("lie", "two words", "false word", "weights", "row", "note", "contradictions", "forged row", "unsigned message")


def refuted(evidence: Evidence) -> str:
    findings = verify_evidence(evidence)
    assert not findings.holds and not findings.proves
    return findings.verdict


def edited(path: Path, change: Callable[[Any], Any]) -> str:
    """Why a file that was edited is refused, when it is read or when it is verified."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    try:
        return refuted(read_evidence(path))
    except ConfigurationError as error:
        assert str(error).startswith(str(path))
        return str(error)


STATEMENT_FIELDS = {"kind": 0, "run": 8, "step": 31, "attempt": 35, "stage": 39, "replica": 43, "what it is about": 44, "last": -65}
"""At which byte of a signed statement a field ends or begins; the signature after it has 64."""


@pytest.mark.parametrize("field", [*STATEMENT_FIELDS, "signature"])
@pytest.mark.parametrize("name", PROVEN)
def test_each_field_of_a_statement_counts(name: str, field: str, tmp_path: Path) -> None:
    path = write_evidence(EVERY_REASON[name](), tmp_path)
    # The first message of evidence of a forged row is the forged one: the table has its digest.
    for place in [("messages", 0), ("messages", -1), ("testimonies", -1)]:

        def change(content: Any, place: tuple[str, int] = place) -> None:
            if not content[place[0]]:
                content["messages"].clear()
                return
            entry = content[place[0]]
            encoded = bytearray(of_bytes(entry[place[1]]["vote"] if place[0] == "testimonies" else entry[place[1]]))
            encoded[STATEMENT_FIELDS.get(field, -1)] ^= 1
            if place[0] == "testimonies":
                entry[place[1]]["vote"] = as_text(bytes(encoded))
            else:
                entry[place[1]] = as_text(bytes(encoded))

        before = path.read_bytes()
        says = edited(path, change)
        assert says.endswith(("if that is the same, do not believe it.", "Use the file as the run wrote it."))
        path.write_bytes(before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(PROVEN), draw=st.data())
def test_any_other_byte_of_what_is_signed_is_noticed(name: str, draw: Any) -> None:
    """In a statement, in its signature, in the contents of a row, and in what a vote rests on."""
    evidence = EVERY_REASON[name]()
    signed = [("messages", number) for number in range(len(evidence.messages))]
    signed += [("contents", number) for number in range(len(evidence.contents))]
    signed += [("testimonies", number) for number in range(len(evidence.testimonies))]
    kind, number = draw.draw(st.sampled_from(signed))
    whole = getattr(evidence, kind)[number]
    encoded = bytearray(whole if kind == "contents" else whole.vote.encode() if kind == "testimonies" else whole.encode())
    encoded[draw.draw(st.integers(0, len(encoded) - 1))] ^= draw.draw(st.integers(1, 255))
    try:
        other = bytes(encoded) if kind == "contents" else Signed.decode(bytes(encoded))
        if kind == "testimonies":
            other = dataclasses.replace(whole, vote=other)
    except MalformedMessageError:
        return
    all_of_them = list(getattr(evidence, kind))
    all_of_them[number] = other
    refuted(dataclasses.replace(evidence, **{kind: tuple(all_of_them)}))


def votes_on_weights() -> list[dict[str, Any]]:
    return [{"vote": as_text(vote_on_weights(STAGE[2], LIED).vote.encode()), "recomputation": None}]


def of_another_run() -> str:
    return as_text(row(STAGE[0], b"a row", Moment(bytes([7] * 16), 12, 0)).encode())


class TestBadFiles:
    def test_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_evidence(of_a_lie(), tmp_path)

        def refuse(self: Path, mode: str) -> None:
            raise PermissionError(13, "Permission denied")

        # Root may read whatever the mode of a file says.
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(SystemExit, match=r"cannot be read \(PermissionError: Permission denied\)\. Name a file of the folder"):
            cli.main(["verify-evidence", str(path)])

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"cannot be read \(IsADirectoryError: Is a directory\)\. Name a file of the folder"):
            cli.main(["verify-evidence", str(tmp_path)])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda c: c.update(version=1), "is evidence of version 1, and this lightning-sentinel reads version 2. Use the one"),
            (lambda c: c.update(proof="certain"), "proof is not 'the signatures, which"),
            (lambda c: c["keys"].clear(), "proof is not 'none: nobody signed this"),
            (lambda c: (c["keys"].clear(), c.update(proof=NOBODY)), "is of a worker whose key is not in the evidence"),
            (lambda c: c["keys"].pop(0), "it has no key of worker (stage 1, replica 0), which was banned"),
            (
                lambda c: c["keys"].pop(3),
                "by worker (stage 1, replica 3): lied (error 0.8, tolerance 0.001) is of a worker whose key",
            ),
            (lambda c: c["testimonies"].append(c["testimonies"][1]), "is in it more than once"),
            (lambda c: c["testimonies"].extend(votes_on_weights()), "is not about weight gradients in a row of the evidence"),
            (lambda c: c["messages"].append(of_another_run()), "its statements are of several runs, 00010203 and 07070707"),
            (lambda c: c["messages"].append(c["testimonies"][0]["vote"]), "messages[1] is a vote, and votes belong to"),
            (lambda c: c["contents"].append("AAAA"), "contents[0], of 3 bytes, are of no row that anybody has signed in it"),
            (lambda c: c["contents"].append("?"), "contents[0]: "),
            (lambda c: c.update(record=7), "record has not exactly the fields rule, ban_after"),
        ],
    )
    def test_a_lie_that_was_edited(self, change: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
        assert says in edited(write_evidence(of_a_lie(), tmp_path), change)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda r: r.update(ban_after=True), "record.ban_after is no whole number"),
            (lambda r: r.update(habit=math.nan), "record.habit is no number"),
            (lambda r: r.update(earlier=[1, "x"]), "record.earlier is no state of a streak"),
            (lambda r: r.update(earlier=[1, 0, [[1, 2, 3]]]), "record.earlier is no state of a streak"),
            (lambda r: r.update(steps={}), "record.steps is no list"),
            (lambda r: r["steps"][0].pop("signals"), "record.steps[0] has not exactly the fields step, suspects"),
            (lambda r: r["steps"][0].update(unmistakable=0), "record.steps[0].unmistakable is neither true nor false"),
            (lambda r: r["steps"][1]["signals"][0].update(direction="up"), "record.steps[1].signals[0] has another direction"),
            (lambda r: r["steps"][1]["signals"][0].update(row="AAAA"), "record.steps[1].signals[0] has another direction, row"),
            (lambda r: r["steps"][1]["signals"][0].update(fences=[1.0]), "number of fences"),
            (lambda r: r["steps"][1]["signals"][0].update(fences=["far"] * 4), "record.steps[1].signals[0].fences is no number"),
            (lambda r: r["steps"][1]["signals"][0].update(flagged=None), "flagged is neither true nor false"),
            (lambda r: r["steps"][1]["signals"][0].update(receiver=7), "receiver has not exactly the fields stage, replica"),
        ],
    )
    def test_a_record_that_was_edited(self, change: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
        assert says in edited(write_evidence(of_flags(), tmp_path), lambda content: change(content["record"]))


NOBODY = "none: nobody signed this, so it is a record and no proof"
