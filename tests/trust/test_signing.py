from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
from lightning_sentinel.trust.encoding import LONGEST, encode
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.signing import Signed, check, contradict, fault, sign
from lightning_sentinel.trust.statements import Kind, Moment, Statement
from tests.trust.statements import NOW, PLACE, ROW, RUN, SENDER, SIGNAL, STATEMENTS, VOTE, digest

IDENTITY = Identity.seeded(0, "one")
OTHER = Identity.seeded(0, "other")
DUE: dict[str, Any] = {
    "moment": NOW,
    "sender": SENDER,
    "signal": PLACE,
    "digest": SIGNAL.digest,
}


@settings(deadline=None)
@given(STATEMENTS)
def test_what_is_signed_verifies(statement: Statement) -> None:
    signed = sign(IDENTITY, statement)
    assert signed.verifies(IDENTITY.public)
    assert not signed.verifies(OTHER.public)
    assert Signed.decode(signed.encode()) == signed
    assert signed.encode() == encode(statement) + IDENTITY.sign(encode(statement))


@settings(deadline=None)
@given(st.binary(max_size=2 * LONGEST))
def test_any_bytes_are_refused_with_one_error(encoded: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        Signed.decode(encoded)


def test_a_signature_has_its_length() -> None:
    with pytest.raises(MalformedMessageError, match="A signature of 63 bytes came"):
        Signed(ROW, bytes(63))


class TestFaults:
    def test_none(self) -> None:
        signed = sign(IDENTITY, SIGNAL)
        assert fault(signed, IDENTITY.public, **DUE) is None
        check(signed, IDENTITY.public, **DUE)
        # What the sender alone knows is its word.
        assert fault(sign(IDENTITY, dataclasses.replace(SIGNAL, tainted=True)), IDENTITY.public, **DUE) is None

    @pytest.mark.parametrize(
        "signed", [sign(OTHER, SIGNAL), Signed(SIGNAL, bytes(64)), Signed(SIGNAL, sign(IDENTITY, ROW).signature)]
    )
    def test_of_the_signature(self, signed: Signed[Any]) -> None:
        found = fault(signed, IDENTITY.public, **DUE)
        assert found is not None
        assert found.field == "signature"
        with pytest.raises(MalformedMessageError) as raised:
            check(signed, IDENTITY.public, **DUE)
        assert (
            str(raised.value) == f"The {SIGNAL} bears no valid signature of {IDENTITY.public}: it was changed, or is not its word."
        )

    @pytest.mark.parametrize(
        ("change", "field", "says"),
        [
            ({"moment": Moment(bytes(16), 12, 0)}, "run", "is from another run: a replay"),
            ({"moment": Moment(RUN, 11, 0)}, "step", "is of step 11, not 12: a replay"),
            ({"moment": Moment(RUN, 12, 1)}, "attempt", "is of attempt 1, not 0: a replay"),
            ({"signal": dataclasses.replace(PLACE, slot=2)}, "slot", "is of micro-batch 2, not 3: a replay"),
            ({"signal": dataclasses.replace(PLACE, lane=1)}, "lane", "is of lane 1, not 0: a replay"),
            ({"signal": dataclasses.replace(PLACE, kind=Kind.NOTE)}, "kind", "is about a note, not a signal"),
            (
                {"signal": dataclasses.replace(PLACE, boundary=Boundary(1, Direction.GRADIENT))},
                "boundary",
                "is about the boundary stage2/gradient, not stage1/activation",
            ),
            ({"sender": Worker(1, 1)}, "sender", "is another worker's word: that of worker (stage 1, replica 1), not of"),
            ({"digest": digest("others")}, "digest", f"is about other contents: {digest('others')} was signed, and what came is"),
        ],
    )
    def test_of_a_field(self, change: dict[str, Any], field: str, says: str) -> None:
        """The sender's own signature is on it, and it still is not what is due."""
        statement = dataclasses.replace(SIGNAL, **change)
        found = fault(sign(IDENTITY, statement), IDENTITY.public, **DUE)
        assert found is not None
        assert found.field == field
        assert found.message.startswith(f"The {statement} {says}")

    def test_of_contents(self) -> None:
        tensor = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
        signed = sign(IDENTITY, dataclasses.replace(SIGNAL, digest=digest_of_tensor(tensor, Algorithm.SHA256)))
        due = DUE | {"digest": digest_of_tensor(tensor, Algorithm.SHA256)}
        assert fault(signed, IDENTITY.public, **due) is None
        tensor[1, 4] += 1e-6
        found = fault(signed, IDENTITY.public, **due | {"digest": digest_of_tensor(tensor, Algorithm.SHA256)})
        assert found is not None
        assert found.field == "digest"

    def test_of_rows_and_votes(self) -> None:
        found = fault(sign(IDENTITY, ROW), IDENTITY.public, row=digest("another"))
        assert found is not None
        assert found.field == "row"
        vote = fault(sign(IDENTITY, VOTE), IDENTITY.public, about=digest("another"))
        assert vote is not None
        assert vote.field == "about"


class TestContradictions:
    @pytest.mark.parametrize("change", [{"digest": digest("others")}, {"tainted": True}], ids=str)
    def test_of_a_signal(self, change: dict[str, Any]) -> None:
        first = sign(IDENTITY, SIGNAL)
        second = sign(IDENTITY, dataclasses.replace(SIGNAL, **change))
        assert contradict(first, second, IDENTITY.public)
        assert not contradict(first, first, IDENTITY.public)

    def test_not_of_different_subjects(self) -> None:
        later = dataclasses.replace(SIGNAL, moment=Moment(RUN, 12, 1), digest=digest("others"))
        assert not contradict(sign(IDENTITY, SIGNAL), sign(IDENTITY, later), IDENTITY.public)
        vote = dataclasses.replace(VOTE, about=digest("another"), outcome=0)
        assert not contradict(sign(IDENTITY, VOTE), sign(IDENTITY, vote), IDENTITY.public)

    def test_not_of_what_somebody_else_signed(self) -> None:
        changed = dataclasses.replace(SIGNAL, digest=digest("others"))
        assert not contradict(sign(IDENTITY, SIGNAL), sign(OTHER, changed), IDENTITY.public)
        assert not contradict(sign(IDENTITY, SIGNAL), Signed(changed, bytes(64)), IDENTITY.public)
