"""Which messages of a step all workers say that they have sent and received, from the parts of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.trust.commitments import mismatches
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.parts import Received, decode_part, seal_in
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement, Transfer
from lightning_sentinel.wiring import Wiring

__all__ = ["StepCommitments", "decode"]


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


def decode(parts: Sequence[bytes], mesh: Mesh, wiring: Wiring, moment: Moment) -> StepCommitments:
    """What all workers say; the same on all ranks, whatever the bytes are.

    Args:
        parts: of each rank, :func:`part_length` bytes; what cannot be read says nothing.
        mesh: all workers.
        wiring: which worker served which lane.
        moment: of the step.
    """
    found = StepCommitments()
    for worker, part in zip(mesh.workers, parts):
        seal = seal_in(part)
        if seal is not None:
            found.sealed[worker] = seal
        lane = wiring.lane(worker)
        # Only workers with a lane send, and nobody sends beyond the last stage or before the first one.
        if lane is not None:
            said = decode_part(part, worker, lane, wiring.slots, moment)
            found.sent |= {signal: one for signal, one in said.sent.items() if _exists(signal, mesh)}
            found.received |= {signal: one for signal, one in said.received.items() if _exists(signal, mesh)}
    return found


def _content(statement: SignalStatement) -> Received:
    """What the receiver of a message should have received."""
    return Received(statement.tainted, statement.digest)


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
