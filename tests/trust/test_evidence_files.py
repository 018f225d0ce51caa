from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.trust.evidence import LIED, Evidence
from lightning_sentinel.trust.evidence_files import LARGEST_FILE, read_evidence, write_evidence
from tests.trust.cases import STAGE, of_a_contradiction, of_a_false_word, of_a_lie, signal, testimony

NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_evidence(of_a_lie(), tmp_path)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as raised:
        read_evidence(path)
    assert str(raised.value).startswith(str(path))
    return str(raised.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("evidence", [of_a_lie(), of_a_contradiction(), of_a_false_word()], ids=lambda one: str(one.reason))
def test_what_was_written_is_read(evidence: Evidence, tmp_path: Path) -> None:
    path = write_evidence(evidence, tmp_path)
    assert read_evidence(path) == evidence
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_its_place(path: Path, tmp_path: Path) -> None:
    assert path == tmp_path / "sentinel" / "evidence" / "step-00000012-stage-1-replica-0.json"


def test_what_is_not_finite_is_json_of_everybody(tmp_path: Path) -> None:
    sent = signal()
    evidence = dataclasses.replace(of_a_lie(), testimonies=(testimony(sent, STAGE[2], LIED, error=math.inf),))
    path = write_evidence(evidence, tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read_evidence(path) == evidence


def test_it_replaces_a_file_only_as_a_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*step-00000012-stage-1-replica-0\.json"):
        write_evidence(of_a_lie({2: LIED}), tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


class TestRefusals:
    def test_of_a_file_that_is_missing(self, tmp_path: Path) -> None:
        assert "cannot be read (FileNotFoundError: No such file or directory). Name a file of the folder" in refusal(tmp_path / "x")
        assert "cannot be read (IsADirectoryError" in refusal(tmp_path)

    def test_of_a_large_file(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b" " * LARGEST_FILE)
        assert "is larger than 33,554,432 bytes, and no evidence is." in refusal(path)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.8, 0.999])
    def test_of_a_file_that_was_cut_off(self, path: Path, share: float) -> None:
        content = path.read_bytes().strip()
        path.write_bytes(content[: int(share * len(content))])
        assert "was cut off after" in refusal(path)

    @pytest.mark.parametrize("content", [b"PK\x03\x04", b"\xff\xfe", b"{'format': 1}", b"[" * 100_000 + b"}", b"hello}"])
    def test_of_what_is_no_json(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        assert "is no JSON" in refusal(path)

    @pytest.mark.parametrize("content", ["[]", "7", "{}", '{"format": "another"}', '"lightning-sentinel evidence"', "null"])
    def test_of_other_json(self, path: Path, content: str) -> None:
        path.write_text(content)
        assert "is JSON, and no evidence. Name a file of" in refusal(path)

    @pytest.mark.parametrize("version", [0, 1, 3, None, "1" * 90, [2]])
    def test_of_another_version(self, path: Path, version: object) -> None:
        edit(path, lambda content: content.update(version=version))
        says = (
            f"is evidence of version {str(version)[:20]}, and this lightning-sentinel reads version 2. Use the one that wrote it."
        )
        assert says in refusal(path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda c: c.pop("step"), "the file has not exactly the fields format, version"),
            (lambda c: c.update(note=""), "the file has not exactly the fields"),
            (lambda c: c.update(step=-1), "step is no whole number from 0"),
            (lambda c: c.update(step=True), "step is no whole number"),
            (lambda c: c.update(step=12.0), "step is no whole number"),
            (
                lambda c: c.update(reason="dislike"),
                "reason is none of lied, contradicted itself, withheld, false word, false weight gradients",
            ),
            (lambda c: c.update(reason=["lied"]), "reason is none of"),
            (lambda c: c["banned"].update(stage=2**32), "banned.stage is no whole number from 0 to 4294967295"),
            (lambda c: c.update(banned=[1, 0]), "banned has not exactly the fields stage, replica"),
            (lambda c: c.update(keys={}), "keys is no list"),
            (lambda c: c["keys"].append(c["keys"][0]), "keys[5] is a second key of worker (stage 1, replica 0)"),
            (lambda c: c["keys"][2].update(key="ed25519:AAAA"), "keys[2].key: 'ed25519:AAAA' is no public key"),
            (lambda c: c["keys"][2].update(key=7), "keys[2].key is no text"),
            (lambda c: c["messages"].append("?"), "messages[1]: "),
            (lambda c: c["messages"].append("AAAA"), "messages[1]: 0 bytes came, which begin as no statement"),
            (lambda c: c["messages"].append("ü"), "messages[1]: "),
            (lambda c: c["messages"].append(c["testimonies"][0]["vote"]), "messages[1] is a vote, and votes belong to"),
            (lambda c: c["testimonies"][1].update(vote=c["messages"][0]), "testimonies[1].vote is no vote"),
            (lambda c: c["testimonies"].append({}), "testimonies[4] has not exactly the fields vote, recomputation"),
            (lambda c: c["testimonies"][0].update(recomputation={}), "testimonies[0].recomputation has not exactly the fields"),
            (
                lambda c: found(c).update(recomputed="AAAA"),
                "testimonies[0].recomputation.recomputed: A digest came whose first byte",
            ),
            (lambda c: found(c).update(error=-1), "testimonies[0].recomputation.error is no number that is at least 0"),
            (lambda c: found(c).update(error=math.nan), "testimonies[0].recomputation.error is no number"),
            (lambda c: found(c).update(tolerance=10**400), "testimonies[0].recomputation.tolerance is no number"),
            (lambda c: found(c).update(tolerance="inf"), "testimonies[0].recomputation.tolerance is no number"),
        ],
    )
    def test_of_a_field(self, path: Path, change: Callable[[Any], Any], says: str) -> None:
        edit(path, change)
        message = refusal(path)
        assert f"was edited, or is no evidence: {says}" in message
        assert message.endswith("Use the file as the run wrote it.")

    @settings(deadline=None)
    @given(place=st.data(), value=NESTED)
    def test_whatever_stands_in_a_field(self, tmp_path_factory: pytest.TempPathFactory, place: Any, value: object) -> None:
        """It is read, or refused with one error."""
        path = write_evidence(of_a_lie(), tmp_path_factory.getbasetemp())

        def change(content: Any) -> None:
            while True:
                key = place.draw(st.sampled_from(list(content) if isinstance(content, dict) else range(len(content))))
                if not isinstance(content[key], (dict, list)) or not content[key] or place.draw(st.booleans()):
                    content[key] = value
                    return
                content = content[key]

        edit(path, change)
        try:
            read_evidence(path)
        except ConfigurationError as error:
            assert str(path) in str(error)


def found(content: Any) -> Any:
    return content["testimonies"][0]["recomputation"]
