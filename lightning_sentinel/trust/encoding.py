"""The bytes of a statement: exactly one encoding, of a fixed length that its first eight bytes name.

So a signature over the encoding is one over every field, and no statement can be taken for one of another kind or version. Bytes
from a stranger are looked at field by field before anything is made of them. What does not fit is refused with one error,
:class:`~lightning_sentinel.errors.MalformedMessageError`, whatever the bytes are.

All numbers are unsigned and big-endian. A statement begins with its kind and version (8 bytes), the run (16), the step (8), the
attempt (4), and the stage and the replica of who says it (4 each). A signal's place is its kind (1), direction (1), boundary, lane
and slot (4 each); a digest is its algorithm (1) and value (32).

=========  ====================================================================================================================
statement  what follows
=========  ====================================================================================================================
signal     place; tainted (1); digest
row        digest of the row, digest of the table before
vote       place; digest of the signed statement; outcome (1), live workers (4); digest of the finding
weights    stage and replica of the audited worker (4 each); digest of its sketch; then as in a vote
=========  ====================================================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from struct import Struct
from typing import Any

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.statements import (
    ContributionVote,
    Kind,
    Moment,
    RowStatement,
    SignalId,
    SignalStatement,
    Statement,
    VoteStatement,
)

__all__ = ["LONGEST", "decode", "encode"]

_HEAD = "8s16sQIII"
_HEAD_WORDS = 6
_PLACE = "BBIII"
_PLACE_WORDS = 5
_DIGEST = "33s"
_DIRECTIONS = tuple(Direction)

# The last byte of each is the version of its layout.
_SIGNAL = b"sentsig\x01"
_ROW = b"sentrow\x01"
_VOTE = b"sentvot\x01"
_OF_WEIGHTS = b"sentcon\x01"
_LAYOUTS = {
    _SIGNAL: Struct(f">{_HEAD}{_PLACE}B{_DIGEST}"),
    _ROW: Struct(f">{_HEAD}{_DIGEST}{_DIGEST}"),
    _VOTE: Struct(f">{_HEAD}{_PLACE}{_DIGEST}BI{_DIGEST}"),
    _OF_WEIGHTS: Struct(f">{_HEAD}II{_DIGEST}BI{_DIGEST}"),
}

LONGEST = max(layout.size for layout in _LAYOUTS.values())
"""Length of the longest encoding, in bytes."""


def encode(statement: Statement) -> bytes:
    """The encoding of a statement.

    Raises:
        MalformedMessageError: if a field is out of range.

    Example:
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of
        >>> digest = digest_of(b"a row", Algorithm.SHA256)
        >>> encoded = encode(RowStatement(Moment(bytes(16), step=12, attempt=0), Worker(1, 0), digest, digest))
        >>> len(encoded), encoded[24:44].hex(" ", 4)
        (110, '00000000 0000000c 00000000 00000001 00000000')
    """
    if isinstance(statement, SignalStatement):
        return _pack(_SIGNAL, statement, [*_place(statement.signal), statement.tainted, statement.digest.encode()])
    if isinstance(statement, RowStatement):
        return _pack(_ROW, statement, [statement.row.encode(), statement.table_before.encode()])
    found = [statement.about.encode(), statement.outcome, statement.live, statement.finding.encode()]
    if isinstance(statement, ContributionVote):
        return _pack(_OF_WEIGHTS, statement, [statement.audited.stage, statement.audited.replica, *found])
    return _pack(_VOTE, statement, [*_place(statement.signal), *found])


def decode(encoded: bytes) -> Statement:
    """The statement that these bytes are.

    Args:
        encoded: any bytes at all.

    Raises:
        MalformedMessageError: if they are no statement's one encoding; nothing else is ever raised.

    Example:
        >>> decode(b"sentsig" + bytes(9))
        Traceback (most recent call last):
        lightning_sentinel.errors.MalformedMessageError: 16 bytes came, which begin as no statement of this version does.
    """
    magic = encoded[:8]
    layout = _LAYOUTS.get(magic)
    if layout is None:
        raise MalformedMessageError(f"{len(encoded)} bytes came, which begin as no statement of this version does.")
    if len(encoded) != layout.size:
        raise MalformedMessageError(f"A statement of {len(encoded)} bytes came, and one of its kind has {layout.size}.")
    words = layout.unpack(encoded)
    _, run, step, attempt, stage, replica = words[:_HEAD_WORDS]
    moment = Moment(run, step, attempt)
    sender = Worker(stage, replica)
    words = words[_HEAD_WORDS:]
    if magic == _ROW:
        return RowStatement(moment, sender, *map(Digest.decode, words))
    if magic == _OF_WEIGHTS:
        stage, replica, about, outcome, live, finding = words
        audited = Worker(stage, replica)
        return ContributionVote(moment, sender, audited, Digest.decode(about), outcome, live, Digest.decode(finding))
    signal = _signal_id(*words[:_PLACE_WORDS])
    words = words[_PLACE_WORDS:]
    if magic == _SIGNAL:
        return _signal_statement(moment, sender, signal, words)
    about, outcome, live, finding = words
    return VoteStatement(moment, sender, signal, Digest.decode(about), outcome, live, Digest.decode(finding))


def _pack(magic: bytes, statement: Statement, words: Sequence[Any]) -> bytes:
    moment = statement.moment
    sender = statement.sender
    try:
        return _LAYOUTS[magic].pack(magic, moment.run, moment.step, moment.attempt, sender.stage, sender.replica, *words)
    except struct.error as error:
        raise MalformedMessageError(
            f"The {statement} cannot be encoded: {error}. Steps have 64 bits, outcomes 8, and other numbers 32; none is negative."
        ) from None


def _place(signal: SignalId) -> list[int]:
    boundary = signal.boundary
    return [signal.kind, _DIRECTIONS.index(boundary.direction), boundary.index, signal.lane, signal.slot]


def _signal_id(kind: int, direction: int, boundary: int, lane: int, slot: int) -> SignalId:
    if kind not in tuple(Kind) or direction >= len(_DIRECTIONS):
        raise MalformedMessageError(f"A statement came about a message of the unknown kind {kind} and direction {direction}.")
    return SignalId(Kind(kind), Boundary(boundary, _DIRECTIONS[direction]), lane, slot)


def _signal_statement(moment: Moment, sender: Worker, signal: SignalId, words: Sequence[Any]) -> SignalStatement:
    tainted, digest = words
    # Or there would be several encodings of the same statement.
    if tainted > 1:
        raise MalformedMessageError(f"A statement came about a signal whose taint is {tainted}, and can be 0 or 1.")
    return SignalStatement(moment, sender, signal, bool(tainted), Digest.decode(digest))
