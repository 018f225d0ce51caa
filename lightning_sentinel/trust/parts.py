"""A worker's part of a step's row: which messages it says that it has sent and received, in bytes.

A part has the same length for every worker: it has a place for each message that a worker can send or receive in a step. A message
that the worker did not send or receive leaves its place empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.digests import DIGEST_BYTES, Digest
from lightning_sentinel.trust.identity import SIGNATURE_BYTES, PublicKey
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement

__all__ = ["Part", "Received", "decode_part", "disagreement", "encode_part", "part_length", "read_row", "seal_in"]

_SENT_BYTES = 1 + DIGEST_BYTES + SIGNATURE_BYTES
_RECEIVED_BYTES = 1 + DIGEST_BYTES
_BYTES = _SENT_BYTES + _RECEIVED_BYTES
"""Of one place: taint, digest and signature of what was sent, then taint and digest of what was received."""
_KINDS = len(Kind) * len(Direction)
_TRIED = 4
"""Signatures of a row that are tried with each lane and number of micro-batches: an honest worker's all hold with one of these."""


class Received(NamedTuple):
    """What a receiver says that it received.

    Args:
        tainted: whether the message came with the taint flag; a note has none.
        digest: of the tensor.
    """

    tainted: bool
    digest: Digest


class Part(NamedTuple):
    """What a worker says about the messages of a step.

    Args:
        worker: whose word it is.
        lane: that it served.
        slots: the most micro-batches of a lane in the step.
        sent: what it says about the messages that it sent, with its signatures, which may be anything.
        received: what it says about those that it received.
    """

    worker: Worker
    lane: int
    slots: int
    sent: dict[SignalId, Signed[SignalStatement]]
    received: dict[SignalId, Received]


def part_length(slots: int) -> int:
    """Of a worker's part, in bytes, with the seal of what it has drawn at the end.

    Args:
        slots: the most micro-batches of a lane.

    Example:
        >>> part_length(slots=4)
        2145
    """
    return _BYTES * _KINDS * slots + DIGEST_BYTES


def encode_part(
    sent: Mapping[SignalId, Signed[SignalStatement]],
    received: Mapping[SignalId, Received],
    seal: Digest | None,
    worker: Worker,
    lane: int,
    slots: int,
) -> bytes:
    """A worker's part.

    Args:
        seal: of what it has drawn for the step; ``None`` shows none.

    The other arguments are those of :class:`Part`.
    """
    pieces = []
    for outgoing, incoming in _places(worker.stage, lane, slots):
        signed = sent.get(outgoing)
        said = bytes(_SENT_BYTES)
        if signed is not None:
            said = bytes([signed.statement.tainted]) + signed.statement.digest.encode() + signed.signature
        got = received.get(incoming)
        pieces += [said, bytes(_RECEIVED_BYTES) if got is None else bytes([got.tainted]) + got.digest.encode()]
    return b"".join([*pieces, bytes(DIGEST_BYTES) if seal is None else seal.encode()])


def decode_part(part: bytes, worker: Worker, lane: int, slots: int, moment: Moment) -> Part:
    """What a worker says, whatever the bytes are: a place that cannot be read says nothing.

    Args:
        part: :func:`part_length` bytes.
        worker: whose part it is.
        lane: that the worker served.
        slots: the most micro-batches of a lane.
        moment: of the step.
    """
    found = Part(worker, lane, slots, {}, {})
    for number, (outgoing, incoming) in enumerate(_places(worker.stage, lane, slots)):
        place = part[number * _BYTES : (number + 1) * _BYTES]
        if not any(place):
            continue
        sent, received = _digest(place[1 : 1 + DIGEST_BYTES]), _digest(place[_SENT_BYTES + 1 :])
        if sent is not None:
            statement = SignalStatement(moment, worker, outgoing, place[0] != 0, sent)
            found.sent[outgoing] = Signed(statement, place[1 + DIGEST_BYTES : _SENT_BYTES])
        if received is not None:
            found.received[incoming] = Received(place[_SENT_BYTES] != 0, received)
    return found


def seal_in(part: bytes) -> Digest | None:
    """The seal at the end of a part; ``None`` if it has none."""
    return _digest(part[-DIGEST_BYTES:])


def read_row(contents: bytes, worker: Worker, moment: Moment, key: PublicKey, lanes: int) -> Part | None:
    """The part in a row of which nobody says how many micro-batches it is about, and which lane its worker served.

    Both follow from the worker's own signatures, which hold for one lane and one number of micro-batches only: so nobody can show
    its row to others as one that says something else.

    Args:
        contents: of the row, which end with the part and a digest.
        worker: whose row it is.
        moment: of the step.
        key: of the worker.
        lanes: of the mesh.

    Returns:
        the part; ``None`` if the worker has signed none of the messages in it.
    """
    most = (len(contents) - 2 * DIGEST_BYTES) // (_BYTES * _KINDS)
    for slots in range(1, most + 1):
        part = contents[-DIGEST_BYTES - part_length(slots) : -DIGEST_BYTES]
        for lane in range(lanes):
            found = decode_part(part, worker, lane, slots, moment)
            if any(one.verifies(key) for one in islice(found.sent.values(), _TRIED)):
                return found
    return None


def disagreement(one: Part, other: Part) -> SignalId | None:
    """The first message between two workers about which they do not say the same; ``None`` if there is none, or they had none.

    Args:
        one: what a worker says.
        other: what another one says about the same step.
    """
    if (one.lane, one.slots) != (other.lane, other.slots):
        return None
    for sender, receiver in ((one, other), (other, one)):
        incoming = {received for _, received in _places(receiver.worker.stage, receiver.lane, receiver.slots)}
        for signal, _ in _places(sender.worker.stage, sender.lane, sender.slots):
            said = sender.sent.get(signal)
            sent = None if said is None else Received(said.statement.tainted, said.statement.digest)
            if signal in incoming and sent != receiver.received.get(signal):
                return signal
    return None


def _digest(encoded: bytes) -> Digest | None:
    try:
        return Digest.decode(encoded)
    except MalformedMessageError:
        return None


def _places(stage: int, lane: int, slots: int) -> Iterator[tuple[SignalId, SignalId]]:
    """The places of a worker's part: which message it can have sent, and which one it can have received."""
    for kind in Kind:
        for direction in Direction:
            outgoing, incoming = _boundaries(kind, direction, stage)
            for slot in range(slots):
                yield SignalId(kind, outgoing, lane, slot), SignalId(kind, incoming, lane, slot)


def _boundaries(kind: Kind, direction: Direction, stage: int) -> tuple[Boundary, Boundary]:
    """Across which boundary a stage sends, and across which the signals came that it receives, or receives notes on."""
    forward = direction is Direction.ACTIVATION
    # A note on a signal goes to the worker behind the one that receives the signal.
    behind = 2 if kind is Kind.NOTE else 1
    return Boundary(stage if forward else stage - 1, direction), Boundary(
        stage - behind if forward else stage + behind - 1, direction
    )
