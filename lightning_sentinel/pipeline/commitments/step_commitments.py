"""Which messages of a step workers say that they have sent and received: in bytes, and for all workers together.

A worker's part has the same length on every rank, so that one collective gathers all parts. It has a place for each message that a
worker can send or receive in a step. A message that the worker did not send or receive leaves its place empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.trust.commitments import mismatches
from lightning_sentinel.trust.digests import DIGEST_BYTES, Digest
from lightning_sentinel.trust.identity import SIGNATURE_BYTES
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement, Transfer
from lightning_sentinel.wiring import Wiring

__all__ = ["Received", "StepCommitments", "decode", "encode", "length"]

_SENT_BYTES = 1 + DIGEST_BYTES + SIGNATURE_BYTES
_RECEIVED_BYTES = 1 + DIGEST_BYTES
_BYTES = _SENT_BYTES + _RECEIVED_BYTES
"""Of one place: taint, digest and signature of what was sent, then taint and digest of what was received."""


class Received(NamedTuple):
    """What a receiver says that it received.

    Args:
        tainted: whether the message came with the taint flag; a note has none.
        digest: of the tensor.
    """

    tainted: bool
    digest: Digest


@dataclass
class StepCommitments:
    """What workers say about the messages of a step.

    Args:
        sent: what senders say, and sign.
        received: what receivers say that they received.
        sealed: the seals of what workers have drawn for the step.
    """

    sent: dict[SignalId, Signed[SignalStatement]] = field(default_factory=dict)
    received: dict[SignalId, Received] = field(default_factory=dict)
    sealed: dict[Worker, Digest] = field(default_factory=dict)

    def sent_digest(self, signal: SignalId) -> Digest | None:
        """The digest of what the sender says that it sent; ``None`` if it says nothing."""
        signed = self.sent.get(signal)
        return None if signed is None else signed.statement.digest

    def is_tainted(self, signal: SignalId) -> bool:
        """Whether the sender says that it left the micro-batch out."""
        signed = self.sent.get(signal)
        return signed is not None and signed.statement.tainted

    def agrees(self, signal: SignalId) -> bool:
        """Whether the sender says what it sent, and the receiver that it got the same."""
        signed = self.sent.get(signal)
        return signed is not None and _content(signed.statement) == self.received.get(signal)

    def contradictions(self, mesh: Mesh, wiring: Wiring) -> list[Transfer]:
        """The messages about which sender and receiver disagree, in order; with those signals about which both are silent.

        Args:
            mesh: all workers.
            wiring: which worker served which lane.
        """
        sent = {_transfer(signal, mesh, wiring): _content(one.statement) for signal, one in self.sent.items()}
        received = {_transfer(signal, mesh, wiring): one for signal, one in self.received.items()}
        silent = [one for one in _signals(mesh, wiring) if one not in self.sent and one not in self.received]
        return sorted([*mismatches(sent, received), *(_transfer(signal, mesh, wiring) for signal in silent)])


def length(slots: int) -> int:
    """Of a worker's part, in bytes.

    Args:
        slots: the most micro-batches of a lane.

    Example:
        >>> length(slots=4)
        2145
    """
    return _BYTES * len(Kind) * len(Direction) * slots + DIGEST_BYTES


def encode(
    sent: Mapping[SignalId, Signed[SignalStatement]],
    received: Mapping[SignalId, Received],
    seal: Digest | None,
    worker: Worker,
    lane: int,
    slots: int,
) -> bytes:
    """A worker's part.

    Args:
        sent: what it says about the messages that it sent.
        received: what it says about the messages that it received.
        seal: of what it has drawn for the step; ``None`` shows none.
        worker: whose part it is.
        lane: that the worker serves.
        slots: the most micro-batches of a lane.
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


def decode(parts: Sequence[bytes], mesh: Mesh, wiring: Wiring, moment: Moment) -> StepCommitments:
    """What all workers say; the same on all ranks, whatever the bytes are.

    Args:
        parts: of each rank, :func:`length` bytes; what cannot be read says nothing.
        mesh: all workers.
        wiring: which worker served which lane.
        moment: of the step.
    """
    found = StepCommitments()
    for worker, part in zip(mesh.workers, parts):
        seal = _digest(part[-DIGEST_BYTES:])
        if seal is not None:
            found.sealed[worker] = seal
        lane = wiring.lane(worker)
        for number, (outgoing, incoming) in enumerate(_places(worker.stage, lane or 0, wiring.slots)):
            place = part[number * _BYTES : (number + 1) * _BYTES]
            # Only workers with a lane send, and nobody sends beyond the last stage or before the first one.
            if lane is None or not any(place):
                continue
            if _exists(outgoing, mesh):
                _add_sent(found, place[:_SENT_BYTES], moment, worker, outgoing)
            if _exists(incoming, mesh):
                _add_received(found, place[_SENT_BYTES:], incoming)
    return found


def _add_sent(found: StepCommitments, place: bytes, moment: Moment, worker: Worker, signal: SignalId) -> None:
    digest = _digest(place[1 : 1 + DIGEST_BYTES])
    if digest is not None:
        statement = SignalStatement(moment, worker, signal, place[0] != 0, digest)
        found.sent[signal] = Signed(statement, place[1 + DIGEST_BYTES :])


def _add_received(found: StepCommitments, place: bytes, signal: SignalId) -> None:
    digest = _digest(place[1:])
    if digest is not None:
        found.received[signal] = Received(place[0] != 0, digest)


def _content(statement: SignalStatement) -> Received:
    """What the receiver of a message should have received."""
    return Received(statement.tainted, statement.digest)


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


def _signals(mesh: Mesh, wiring: Wiring) -> Iterator[SignalId]:
    """All signals of a step."""
    for boundary in mesh.boundaries:
        for lane in wiring.lanes:
            for slot in range(len(wiring.work[lane])):
                yield SignalId(Kind.SIGNAL, boundary, lane, slot)


def _exists(signal: SignalId, mesh: Mesh) -> bool:
    boundary = signal.boundary
    return boundary in mesh.boundaries and (signal.kind is Kind.SIGNAL or mesh.after(boundary) is not None)


def _transfer(signal: SignalId, mesh: Mesh, wiring: Wiring) -> Transfer:
    boundary = signal.boundary
    if signal.kind is Kind.NOTE:
        after = mesh.after(boundary)
        assert after is not None, "there are no other notes"
        receiver = after.receiver
    else:
        receiver = boundary.receiver
    return Transfer(wiring.worker(boundary.sender, signal.lane), wiring.worker(receiver, signal.lane), signal)
