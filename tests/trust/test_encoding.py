from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.encoding import LONGEST, decode, encode
from lightning_sentinel.trust.statements import Moment, Statement
from tests.trust.statements import OF_WEIGHTS, ROW, RUN, SIGNAL, STATEMENTS, VOTE

BEGINNINGS = st.sampled_from([encode(one)[:8] for one in (SIGNAL, ROW, VOTE, OF_WEIGHTS)])


def refusal(encoded: bytes) -> str:
    with pytest.raises(MalformedMessageError) as raised:
        decode(encoded)
    return str(raised.value)


def changed(statement: Statement, place: int, byte: int) -> bytes:
    encoded = bytearray(encode(statement))
    encoded[place] = byte
    return bytes(encoded)


@settings(deadline=None)
@given(STATEMENTS)
def test_what_was_encoded_is_decoded(statement: Statement) -> None:
    encoded = encode(statement)
    assert len(encoded) <= LONGEST
    assert decode(encoded) == statement


@settings(deadline=None)
@given(STATEMENTS, STATEMENTS)
def test_different_statements_have_different_encodings(one: Statement, other: Statement) -> None:
    assert (encode(one) == encode(other)) == (one == other)


@settings(deadline=None)
@given(st.binary(max_size=2 * LONGEST) | st.builds(bytes.__add__, BEGINNINGS, st.binary(max_size=LONGEST)))
def test_any_bytes_are_refused_with_one_error(encoded: bytes) -> None:
    try:
        statement = decode(encoded)
    except MalformedMessageError:
        return
    assert encode(statement) == encoded


@settings(deadline=None)
@given(STATEMENTS, st.data())
def test_a_changed_byte_is_refused_or_another_statement(statement: Statement, data: Any) -> None:
    encoded = bytearray(encode(statement))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    try:
        other = decode(bytes(encoded))
    except MalformedMessageError:
        return
    assert other != statement
    assert encode(other) == encoded


def test_the_layout_of_a_signal() -> None:
    head = b"sentsig\x01" + RUN + struct.pack(">QIII", 12, 0, 1, 0)
    assert encode(SIGNAL) == head + struct.pack(">BBIII", 1, 0, 1, 0, 3) + b"\x00\x01" + SIGNAL.digest.value


def test_the_layout_of_a_row() -> None:
    head = b"sentrow\x01" + RUN + struct.pack(">QIII", 12, 0, 1, 0)
    assert encode(ROW) == head + b"\x01" + ROW.row.value + b"\x01" + ROW.table_before.value


def test_the_layout_of_a_vote() -> None:
    head = b"sentvot\x01" + RUN + struct.pack(">QIII", 12, 0, 1, 2) + struct.pack(">BBIII", 1, 0, 1, 0, 3)
    found = struct.pack(">BI", 1, 5) + b"\x01" + VOTE.finding.value
    assert encode(VOTE) == head + b"\x01" + VOTE.about.value + found


def test_the_layout_of_a_vote_on_weight_gradients() -> None:
    head = b"sentcon\x01" + RUN + struct.pack(">QIII", 12, 0, 1, 2) + struct.pack(">II", 1, 0)
    found = struct.pack(">BI", 1, 5) + b"\x01" + OF_WEIGHTS.finding.value
    assert encode(OF_WEIGHTS) == head + b"\x01" + OF_WEIGHTS.about.value + found


class TestRefusals:
    def test_of_another_version(self) -> None:
        assert "begin as no statement of this version" in refusal(changed(SIGNAL, 7, 2))

    @pytest.mark.parametrize("statement", [SIGNAL, ROW, VOTE, OF_WEIGHTS], ids=lambda one: type(one).__name__)
    def test_of_another_length(self, statement: Statement) -> None:
        encoded = encode(statement)
        for other in (encoded[:-1], encoded + b"\x00", encoded[:8]):
            assert refusal(other) == f"A statement of {len(other)} bytes came, and one of its kind has {len(encoded)}."

    @pytest.mark.parametrize(
        ("place", "byte", "says"),
        [
            (44, 3, "unknown kind 3 and direction 0"),
            (45, 2, "unknown kind 1 and direction 2"),
            (58, 2, "taint is 2, and can be 0 or 1"),
            (59, 3, "A digest came whose first byte is 03"),
        ],
    )
    def test_of_a_field(self, place: int, byte: int, says: str) -> None:
        assert says in refusal(changed(SIGNAL, place, byte))


class TestWhatCannotBeEncoded:
    @pytest.mark.parametrize(
        "change",
        [
            {"moment": Moment(RUN, 2**64, 0)},
            {"moment": Moment(RUN, 0, -1)},
            {"sender": Worker(2**32, 0)},
        ],
        ids=str,
    )
    def test_numbers_out_of_range(self, change: dict[str, Any]) -> None:
        with pytest.raises(MalformedMessageError, match="cannot be encoded"):
            encode(dataclasses.replace(SIGNAL, **change))

    @pytest.mark.parametrize("outcome", [-1, 256])
    def test_outcomes_out_of_range(self, outcome: int) -> None:
        with pytest.raises(MalformedMessageError, match="outcomes 8"):
            encode(dataclasses.replace(VOTE, outcome=outcome))
